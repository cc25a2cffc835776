"""The parts of a diffusion transformer or U-Net, as plain data that a file can carry."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

BRANCHES = ("attn", "cross_attn", "joint_attn", "mlp", "fused", "conv")
MADE = "made."  # begins the name of an output that continues no argument, such as a hint for another block
MAX_SITES = 10_000  # and blocks, that a description may have; the largest models have some hundreds
MAIN_STREAMS = ("hidden_states", "x")  # what blocks call the stream of the latents


class AnatomyError(ValueError):
    """A model, or the description of one, is not what it was taken for."""


@dataclass(frozen=True)
class Site:
    """One branch of one block: the place where an output can be kept and given again."""

    branch: str  # kind, and the name where a block has several of the kind: "mlp", "mlp.context"
    module: str  # path inside the block of the module whose return value is kept
    macs: int = 0  # multiply-accumulates of one call, those of the inner modules included
    inner: tuple[str, ...] = ()  # paths of the modules that run before it and feed nothing else, in their order

    @property
    def entrance(self) -> str:
        """Path inside the block of the module that runs first for this site."""
        return self.modules[0]

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths inside the block of all modules that run for this site only, in their order."""
        return (*self.inner, self.module)


@dataclass(frozen=True)
class Block:
    """One transformer block, or one residual block, transformer or sampler of a U-Net, as it is called once."""

    index: int  # execution order, over all main blocks
    path: str  # container inside the model: "transformer_blocks"
    position: int  # place in the container
    kind: str  # class name
    returns: str | tuple[str | None, ...]  # argument that each output continues; `made.0`: none; None: no output
    sites: tuple[Site, ...]
    norms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # path inside the block -> all branches it feeds
    macs: int = 0  # of one call, its sites included
    shapes: tuple[tuple[int, ...], ...] = ()  # of a U-Net: of its stream as it enters and as it leaves, without batch
    middle: str = ""  # path inside the block of the module that is given the stream as the attention left it, if any
    one_token: bool = field(default=False, compare=False)  # whether, all branches reused, its norms may give one token

    @property
    def module(self) -> str:
        """Path of the block inside the model."""
        return f"{self.path}.{self.position}"

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the arguments that enter as a stream and leave as one."""
        returns = (self.returns,) if isinstance(self.returns, str) else self.returns
        return tuple(name for name in returns if name is not None and not name.startswith(MADE))

    @property
    def main_stream(self) -> str:
        """Name of the stream that goes on with the latents: the only one, or one with a usual name; else empty."""
        known = self.streams if len(self.streams) == 1 else [n for n in MAIN_STREAMS if n in self.streams]
        return known[0] if known else ""

    def key(self, site: Site) -> str:
        """Return the name of a site in the whole model: `7.mlp.context`."""
        return f"{self.index}.{site.branch}"


def block_of(key: str) -> int:
    """Return the block of a site, of `7.mlp.context` 7."""
    return int(key.partition(".")[0])


def branch_of(key: str) -> str:
    """Return the branch of a site, of `7.mlp.context` `mlp.context`."""
    return key.partition(".")[2]


def kind_of_branch(branch: str) -> str:
    """Return what a branch does, whichever stream it is of: of `mlp.context` `mlp`."""
    return branch.partition(".")[0]


@dataclass(frozen=True)
class Anatomy:
    """Blocks, sites, streams and segments of one model.

    Attributes:
        model: Class name of the model.
        blocks: The main blocks in execution order; token refiners, which do not see the latents, are not among them.
        segments: Runs of blocks `(start, stop)`, half open, that one delta per stream may replace.
        macs: Multiply-accumulates of one call of the model, at the size it was surveyed with.
        latents: Shape of that call's latents without the batch.
        links: Skip connections of a U-Net `(maker, taker)`, the outermost first: what block `maker` made enters block
            `taker` besides the output of the block before it. -1 makes what enters the first block.
    """

    model: str
    blocks: tuple[Block, ...]
    segments: tuple[tuple[int, int], ...]
    macs: int = 0
    latents: tuple[int, ...] = ()
    links: tuple[tuple[int, int], ...] = ()

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Keys of all sites, `<block>.<branch>`, in execution order."""
        return tuple(block.key(site) for block in self.blocks for site in block.sites)

    def segment(self, block: int) -> tuple[int, int]:
        """Return the segment `(start, stop)` that holds a block."""
        return next(segment for segment in self.segments if segment[0] <= block < segment[1])

    def enclosed(self, branch: int) -> tuple[int, int]:
        """Return the blocks [start, stop) of a U-Net that lie inside its skip connection `branch`, 0 the outermost."""
        maker, taker = self.links[branch]
        return maker + 1, taker

    def inside(self, start: int, stop: int) -> tuple[str, ...]:
        """Return the paths of the modules of a U-Net that run between the first and the last of blocks [start, stop).

        A stage, all of whose blocks are there, is one module.
        """
        inner = self.blocks[start + 1 : stop - 1]
        stages = [block.path.rpartition(".")[0] for block in self.blocks]
        whole = {s for s in stages if stages.count(s) == sum(block.path.rpartition(".")[0] == s for block in inner)}
        paths = ((block.path.rpartition(".")[0], block.module) for block in inner)
        return tuple(dict.fromkeys(stage if stage in whole else module for stage, module in paths))

    def obstacle(self, start: int, stop: int, *, delta: bool) -> str:
        """Say why one tensor cannot stand for blocks [start, stop) of a U-Net; empty if it can.

        Args:
            start: First block.
            stop: The block behind the last.
            delta: Whether it is to be added to what enters the range, and not to take the place of what leaves it.
        """
        for maker, taker in self.links:
            if start <= maker < stop <= taker:
                return f"what block {maker} makes also enters block {taker}, through a skip connection"
        if delta and self.links and self.blocks[start].shapes[0] != self.blocks[stop - 1].shapes[1]:
            enters, leaves = (
                " x ".join(map(str, shape)) for shape in (self.blocks[start].shapes[0], self.blocks[stop - 1].shapes[1])
            )
            return f"what enters them is {enters}, what leaves them {leaves}, and they have no difference"
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return the description that `from_json` reads: equal neighbours are written once."""

        def shape(block: Block) -> tuple[Any, ...]:
            norms = tuple(sorted(block.norms.items()))
            where = (block.index - block.position, block.path, block.kind, block.returns)
            return *where, block.sites, norms, block.macs, block.shapes, block.middle, block.one_token

        blocks = []
        for _, run in groupby(self.blocks, key=shape):
            alike = list(run)
            first = alike[0]
            blocks.append(
                {
                    "blocks": span(first.index, alike[-1].index),
                    "module": f"{first.path}.{span(first.position, alike[-1].position)}",
                    "class": first.kind,
                    "returns": first.returns if isinstance(first.returns, str) else list(first.returns),
                    "sites": {site.branch: _written(site) for site in first.sites},
                    "norms": {path: list(feeds) for path, feeds in first.norms.items()},
                    "macs": first.macs,
                    **({"shapes": [list(shape) for shape in first.shapes]} if first.shapes else {}),
                    **({"middle": first.middle} if first.middle else {}),
                    **({"one_token": True} if first.one_token else {}),
                }
            )
        return {
            "model": self.model,
            "macs": self.macs,
            "latents": list(self.latents),
            "segments": [span(start, stop - 1) for start, stop in self.segments],
            **({"links": [list(link) for link in self.links]} if self.links else {}),
            "blocks": blocks,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Anatomy":
        """Read a description.

        Raises:
            AnatomyError: If a key is missing or unknown, or a value is not of its kind.
        """
        check_keys("anatomy", content, {"model", "macs", "latents", "segments", "blocks"}, optional={"links"})
        blocks: list[Block] = []
        try:
            sites = 0
            for entry in content["blocks"]:
                _check_entry(entry, len(blocks), sites)
                added = _read_blocks(entry)
                blocks += added
                sites += len(added) * len(added[0].sites)
            segments = tuple((a, b + 1) for a, b in map(parse_span, content["segments"]))
            if any(stop > len(blocks) for _, stop in segments):
                raise AnatomyError(
                    f"the anatomy has {len(blocks)} blocks, but segments up to block {max(segments)[1] - 1}"
                )
            anatomy = cls(
                model=str(content["model"]),
                blocks=tuple(blocks),
                segments=segments,
                macs=int(content["macs"]),
                latents=tuple(int(n) for n in content["latents"]),
                links=tuple((int(maker), int(taker)) for maker, taker in content.get("links", ())),
            )
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            if isinstance(error, AnatomyError):
                raise
            raise AnatomyError(f"the anatomy cannot be read: {error}") from error
        covered = [index for start, stop in segments for index in range(start, stop)]
        if [b.index for b in blocks] != list(range(len(blocks))) or covered != list(range(len(blocks))):
            raise AnatomyError(
                f"the anatomy's blocks and segments must both count 0 to {len(blocks) - 1} in order, "
                f"but its segments are {content['segments']}"
            )
        if any(not -1 <= maker < taker < len(blocks) for maker, taker in anatomy.links) or (
            anatomy.links and any(len(block.shapes) != 2 for block in blocks)
        ):
            raise AnatomyError(
                f"the anatomy's links must each go from a block to a later one of 0 to {len(blocks) - 1}, and its "
                f"blocks have the shape of what enters and of what leaves them; found links {content['links']}"
            )
        return anatomy


def _written(site: Site) -> dict[str, Any]:
    entry = {"module": site.module, "macs": site.macs}
    return {**entry, "inner": list(site.inner)} if site.inner else entry


def _check_entry(entry: Mapping[str, Any], blocks: int, sites: int) -> None:
    """Raise AnatomyError unless an entry continues so many blocks and sites, and does not make too many of them."""
    keys = {"blocks", "module", "class", "returns", "sites", "norms", "macs"}
    check_keys("anatomy block", entry, keys, optional={"shapes", "middle", "one_token"})
    first, last = parse_span(entry["blocks"])
    if first != blocks:
        raise AnatomyError(f"the anatomy's blocks must count from 0 in order: found {entry['blocks']} after {blocks}")
    if last >= MAX_SITES or sites + (last - first + 1) * len(entry["sites"]) > MAX_SITES:
        raise AnatomyError(f"the anatomy has more than {MAX_SITES} blocks or sites, which no model has")


def _read_blocks(entry: Mapping[str, Any]) -> list[Block]:
    first, last = parse_span(entry["blocks"])
    path, _, positions = entry["module"].rpartition(".")
    start, end = parse_span(positions)
    if end - start != last - first:
        raise AnatomyError(f"blocks {entry['blocks']} cannot be the modules {entry['module']}: the counts differ")
    sites = []
    for branch, site in entry["sites"].items():
        check_branch(branch)
        check_keys(f"site {branch}", site, {"module", "macs"}, optional={"inner"})
        inner = site.get("inner", [])
        if not isinstance(inner, list) or not all(isinstance(path, str) for path in inner):
            raise AnatomyError(f"site {branch}: inner must be a list of the paths of modules, found {inner!r}")
        sites.append(Site(branch=branch, module=site["module"], macs=int(site["macs"]), inner=tuple(inner)))
    returns = entry["returns"]
    if not isinstance(returns, (str, list)):
        raise AnatomyError(f"blocks {entry['blocks']}: returns must be a name or a list of names, found {returns!r}")
    texts = [entry["module"], entry["class"], *(site.module for site in sites)]
    texts += [name for name in ([returns] if isinstance(returns, str) else returns) if name is not None]
    texts += [name for feeds in entry["norms"].values() for name in feeds]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise AnatomyError(f"blocks {entry['blocks']}: modules, classes and streams have names, found {wrong[0]!r}")
    return [
        Block(
            index=first + offset,
            path=path,
            position=start + offset,
            kind=entry["class"],
            returns=returns if isinstance(returns, str) else tuple(returns),
            sites=tuple(sites),
            norms={norm: tuple(feeds) for norm, feeds in entry["norms"].items()},
            macs=int(entry["macs"]),
            shapes=tuple(tuple(int(n) for n in shape) for shape in entry.get("shapes", ())),
            middle=str(entry.get("middle", "")),
            one_token=entry.get("one_token") is True,
        )
        for offset in range(last - first + 1)
    ]


def check_branch(branch: str) -> None:
    """Raise AnatomyError unless a branch is of a known kind, whatever its name behind the dot."""
    if kind_of_branch(branch) not in BRANCHES:
        raise AnatomyError(f"unknown branch {branch!r}; a branch is one of {', '.join(BRANCHES)}")


def check_keys(
    what: str, content: Mapping[str, Any], keys: set[str], *, optional: set[str] | frozenset[str] = frozenset()
) -> None:
    """Raise AnatomyError unless `content` has exactly these keys, and besides them only optional ones."""
    if not isinstance(content, Mapping):
        raise AnatomyError(f"{what}: found {type(content).__name__}, needed an object with {', '.join(sorted(keys))}")
    unknown, missing = sorted(content.keys() - keys - optional), sorted(keys - content.keys())
    if unknown or missing:
        found = [f"unknown key {', '.join(unknown)}"] if unknown else []
        found += [f"missing key {', '.join(missing)}"] if missing else []
        raise AnatomyError(f"{what}: {'; '.join(found)}; it has the keys {', '.join(sorted(keys | optional))}")


def span(first: int, last: int) -> str:
    """Write a range of indices, both included: `7-27`, or `7`."""
    return str(first) if first == last else f"{first}-{last}"


def parse_span(text: str) -> tuple[int, int]:
    """Read `7-27` or `7` as its first and last index."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", str(text), re.ASCII)
    if match is None:
        raise AnatomyError(f"{text!r} is not a range of blocks; write `7` or `7-27`")
    start, end = int(match[1]), int(match[2] or match[1])
    if start > end:
        raise AnatomyError(f"{text!r} is not a range of blocks: it must rise from 0 or more")
    return start, end
