"""Count the multiply-accumulates of one pass of a model from its configuration alone, without weights."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy, AnatomyError, Block, survey
from dicache.anatomy.inputs import Inputs, example_inputs, latents_of
from dicache.anatomy.macs import TOTAL, count_macs
from dicache.anatomy.overrides import Overrides, forward_of
from dicache.anatomy.recognising import containers
from dicache.anatomy.unets import is_unet
from dicache.models.configs import ModelConfig

COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHALLOW = 2  # blocks of each list in the copy that is surveyed: a last block may differ from the others
COPIED_WHOLE = 2e8  # parameters, 0.8 GB, up to which a copy of all blocks is surveyed where a shallow one does not do
WIDE_BY_HEADS = ("FluxTransformer2DModel",)  # no other number of their configuration has to agree with the width
HEADS = 2  # in a copy of these
NARROW = 8  # channels of a U-Net's first stage in the copy
SMALL = 8  # height and width of the latents that it is surveyed with


class CostError(ValueError):
    """The operations of a model cannot be counted as asked."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates in two conventions: of all operators, and of linear and convolution layers only."""

    all: float
    papers: float

    def times(self, factor: float) -> "Macs":
        return Macs(self.all * factor, self.papers * factor)


@dataclass(frozen=True)
class Size:
    """What the denoiser is called with: pixels, and tokens of text."""

    height: int
    width: int
    text_tokens: int | None = None


class PassCost:
    """What one guidance pass of one image costs at one step, as a whole and by part.

    The model is built and called on the meta device, where tensors have shapes and no numbers.

    Args:
        source: The model's configuration.
        size: Of the image and the text.

    Raises:
        CostError: If the model cannot be built or called.
    """

    def __init__(self, source: ModelConfig, size: Size) -> None:
        self.source, self.size = source, size
        self.model = _built(source, source.config, "meta")
        self._inputs = _inputs(self.model, source, size)
        with _layers(self.model) as self.layers:
            total = self._count()[TOTAL]
        self.total = Macs(total, sum(self.layers.values()))

    def _count(self, paths: Iterable[str] = ()) -> Counter[str]:
        try:
            return count_macs(lambda: self.model(*self._inputs.args, **self._inputs.kwargs), self.model, paths)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            said = " ".join(str(error).split())
            raise CostError(f"{self.source.name} cannot be called with {self._inputs_in_words}: {said}") from None

    @property
    def _inputs_in_words(self) -> str:
        text = "" if self.size.text_tokens is None else f" and {self.size.text_tokens} text tokens"
        return f"{self.size.height} x {self.size.width} pixels{text}"

    def of_layers(self, paths: Sequence[str]) -> int:
        """Return the multiply-accumulates of the linear and convolution layers in some modules."""
        inside = tuple(f"{path}." for path in paths)
        return sum(macs for layer, macs in self.layers.items() if f"{layer}.".startswith(inside))

    def anatomy(self) -> Anatomy:
        """Return the anatomy with the multiply-accumulates of all operators.

        What the blocks are made of is surveyed on a copy of the model of a few blocks, with numbers; each block of the
        whole is described by the one there that is built from the same modules. A small model is copied whole if
        blocks of its middle are like none at its ends.

        The copy has all blocks, of fewer channels, of a U-Net or where a width follows from the number of heads alone.

        Raises:
            AnatomyError: If there are no blocks, or some that none of those that are surveyed describes.
        """
        if is_unet(self.model):
            copied = _with_numbers(self.source, _narrow_config(self.source))
            small = survey(copied, example_inputs(copied))
            return self._measured(small, self._shaped(small.blocks))
        if self.source.kind in WIDE_BY_HEADS:
            copied = _with_numbers(self.source, {**self.source.config, "num_attention_heads": HEADS})
            small = survey(copied, example_inputs(copied))
            return self._measured(small, list(small.blocks))
        small, blocks, unlike = self._described(_shallow_config(self.source, self.model))
        if unlike and sum(parameter.numel() for parameter in self.model.parameters()) <= COPIED_WHOLE:
            small, blocks, unlike = self._described(dict(self.source.config))
        if unlike:
            raise AnatomyError(f"{self.source.name}: {unlike} is built like none of the blocks that were surveyed")
        return self._measured(small, blocks)

    def _described(self, config: Mapping[str, Any]) -> tuple[Anatomy, list[Block], str]:
        """Survey a copy of some configuration; return its anatomy, the whole's blocks, and one it has none like."""
        copied = _with_numbers(self.source, config)
        small = survey(copied, example_inputs(copied))
        alike = {_built_from(copied.get_submodule(block.module)): block for block in small.blocks}
        blocks: list[Block] = []
        for path, container in containers(self.model).items():
            if all(block.path != path for block in small.blocks):
                continue  # refines text
            for position, module in enumerate(container):
                known = alike.get(_built_from(module))
                if known is None:
                    return small, [], f"{path}.{position}"
                blocks.append(replace(known, index=len(blocks), path=path, position=position))
        return small, blocks, ""

    def _shaped(self, blocks: Sequence[Block]) -> list[Block]:
        """Return a U-Net's blocks with the shapes of what enters and leaves them in the whole."""
        shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

        def watched(block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                returned = forward(*args, **kwargs)
                entering = args[0] if args else kwargs[block.streams[0]]
                leaving = returned[0] if isinstance(returned, tuple) else returned
                shapes[block.module] = (tuple(entering.shape[1:]), tuple(leaving.shape[1:]))
                return returned

            return run

        with Overrides() as overrides:
            for block in blocks:
                module = self.model.get_submodule(block.module)
                overrides.set(module, watched(block, forward_of(module)))
            self._count()
        return [replace(block, shapes=shapes[block.module]) for block in blocks]

    def _measured(self, small: Anatomy, blocks: list[Block]) -> Anatomy:
        paths = [block.module for block in blocks]
        paths += [f"{block.module}.{path}" for block in blocks for site in block.sites for path in site.modules]
        macs = self._count(paths)
        measured = [
            replace(
                block,
                macs=macs[block.module],
                sites=tuple(
                    replace(site, macs=sum(macs[f"{block.module}.{path}"] for path in site.modules))
                    for site in block.sites
                ),
            )
            for block in blocks
        ]
        latents = latents_of(self._inputs.args, self._inputs.kwargs)
        return Anatomy(
            model=small.model,
            blocks=tuple(measured),
            segments=small.segments if small.links else _segments(small, blocks),
            macs=macs[TOTAL],
            latents=tuple(latents.shape[1:]),
            links=small.links,
        )


def _built(source: ModelConfig, config: Mapping[str, Any], device: str) -> nn.Module:
    import diffusers

    kind = getattr(diffusers, source.kind, None)
    if kind is None or not issubclass(kind, nn.Module):
        raise CostError(f"{source.name} is a {source.kind}, which the installed diffusers does not have")
    with torch.device(device):
        model: nn.Module = kind.from_config(dict(config))
    return model.eval()


def _latents(source: ModelConfig, size: Size) -> tuple[int, ...]:
    per = source.pixels_per_latent
    if size.height % per or size.width % per:
        raise CostError(
            f"{source.name}: height and width must be multiples of {per}, found {size.height} and {size.width}"
        )
    return source.config["in_channels"], size.height // per, size.width // per


def _inputs(model: nn.Module, source: ModelConfig, size: Size) -> Inputs:
    """Return arguments of one pass of one image, on the meta device."""
    channels, height, width = _latents(source, size)
    given = example_inputs(model)
    kwargs = {name: _first(value) for name, value in given.kwargs.items()}
    if "img_ids" in kwargs:  # patches of two by two latents, packed before the model
        patches = (height // 2) * (width // 2)
        kwargs["hidden_states"] = _empty(1, patches, channels)
        kwargs["img_ids"] = _empty(patches, given.kwargs["img_ids"].shape[-1])
        kwargs["txt_ids"] = _empty(_tokens(source, size), given.kwargs["txt_ids"].shape[-1])
    else:
        kwargs["sample" if "sample" in kwargs else "hidden_states"] = _empty(1, channels, height, width)
    if "encoder_hidden_states" in kwargs:
        kwargs["encoder_hidden_states"] = _empty(1, _tokens(source, size), kwargs["encoder_hidden_states"].shape[-1])
    return Inputs((), kwargs)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _tokens(source: ModelConfig, size: Size) -> int:
    if size.text_tokens is None:
        raise CostError(f"{source.name} reads text, and how many tokens is not known; give --text-tokens")
    return size.text_tokens


def _first(value: Any) -> Any:
    """Return the first sample of a batch, on the meta device."""
    if isinstance(value, Tensor):
        return value[:1].to("meta")
    return {name: _first(part) for name, part in value.items()} if isinstance(value, dict) else value


@contextmanager
def _layers(model: nn.Module) -> Iterator[Counter[str]]:
    """Count the multiply-accumulates of each linear and convolution layer that runs, by its path."""
    macs: Counter[str] = Counter()

    def counting(path: str) -> Callable[..., None]:
        def count(module: Any, _: Any, output: Tensor) -> None:
            macs[path] += output.numel() * module.weight[0].numel()

        return count

    hooks = [m.register_forward_hook(counting(path)) for path, m in model.named_modules() if isinstance(m, COUNTED)]
    try:
        yield macs
    finally:
        for hook in hooks:
            hook.remove()


def _shallow_config(source: ModelConfig, model: nn.Module) -> dict[str, Any]:
    lengths = {len(blocks) for blocks in containers(model).values()}
    if not lengths:
        raise AnatomyError(f"{source.name} is a {source.kind}, which has no row of transformer blocks to cache")
    config = copy.deepcopy(dict(source.config))
    for name, value in config.items():
        if ("layers" in name or "depth" in name) and isinstance(value, int) and value in lengths:
            config[name] = min(value, SHALLOW)
    return {**config, "sample_size": SMALL} if "sample_size" in config else config


def _narrow_config(source: ModelConfig) -> dict[str, Any]:
    """Return a U-Net's configuration with few channels, equal where they were equal."""
    config = copy.deepcopy(dict(source.config))
    channels = config["block_out_channels"]
    order = sorted(set(channels))
    config["block_out_channels"] = [NARROW * (order.index(count) + 1) for count in channels]
    config["norm_num_groups"] = NARROW // 2
    for name in ("attention_head_dim", "num_attention_heads"):
        if config.get(name) is not None:  # both are numbers of heads, by an old mistake of diffusers that stays
            config[name] = [2] * len(channels) if isinstance(config[name], (list, tuple)) else 2
    return {**config, "sample_size": max(SMALL, 2 ** len(channels))}


def _with_numbers(source: ModelConfig, config: Mapping[str, Any]) -> nn.Module:
    """Return a model with random weights, none of them zero, so that all that runs can be seen."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = _built(source, config, "cpu")
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def _built_from(block: nn.Module) -> tuple[Any, ...]:
    """Return what a block is built from: the class of each module, and the shape of each parameter."""
    modules = tuple((path, type(module).__name__) for path, module in block.named_modules())
    return modules, tuple((path, tuple(value.shape)) for path, value in block.named_parameters())


def _segments(small: Anatomy, blocks: Sequence[Block]) -> tuple[tuple[int, int], ...]:
    """Return the segments of the whole: neighbours are in one where those of their lists are in the copy."""
    known = {block.module: block for block in small.blocks}

    def joined(one: Block, other: Block) -> bool:
        lists = [[b.index for b in known.values() if b.path == block.path] for block in (one, other)]
        a, b = (lists[0][-1], lists[1][0]) if one.path != other.path else (lists[0][0], lists[0][-1])
        return small.segment(a) == small.segment(b)

    starts = [0, *(i for i in range(1, len(blocks)) if not joined(blocks[i - 1], blocks[i]))]
    return tuple(zip(starts, [*starts[1:], len(blocks)], strict=True))
