"""Train the router of Learning-to-Cache on a pipeline's own samplings; the model stays as it is."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dicache.anatomy import Anatomy, StepClock
from dicache.anatomy.fingerprint import config_of, digest
from dicache.anatomy.nested import each, tensors_of
from dicache.anatomy.overrides import Overrides
from dicache.anatomy.watching import parameters_of
from dicache.calibrate.l2c import (
    FORMAT,
    LIMIT,
    Router,
    check_steps,
    is_ours,
    load_checkpoint,
    read_router,
    save_checkpoint,
)
from dicache.calibrate.methods import CalibrationError
from dicache.models.sampling import UNCONDITIONAL, Sampling, sample
from dicache.runtime.apply import denoiser
from dicache.runtime.executor import Forward
from dicache.runtime.generation import Call, Generation
from dicache.runtime.naming import PassNames
from dicache.schedules import Target

LABEL_DROPOUT = 0.1  # share of the samples without a condition, as in the released code
SECONDS_BETWEEN_CHECKPOINTS = 30.0

Act = Callable[[str, Any], Any]  # given a site's key and what it gave, what it is to give


@dataclass(frozen=True)
class Training:
    """How a router is trained.

    Attributes:
        penalty: Lambda, of the sum of the betas in the loss, against the mean squared error of the model's output;
            1e-6 and 5e-6 were published for DiT-XL/2. The larger, the more is held.
        iterations: Updates of each step's router. Every iteration is one sampling of a batch, in which the router of
            every second step is updated once.
        learning_rate: Of AdamW; 1e-3 was published, and 1e-2 for DiT-L/2 in 20 steps.
        batch: Samples in a batch.
        seed: Of the conditions and the noise.
    """

    penalty: float = 5e-6
    iterations: int = 500
    learning_rate: float = 1e-2
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, what in (("penalty", 0.0, "0 or more"), ("learning_rate", 1e-12, "more than 0")):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= low):
                raise CalibrationError(f"l2c: the {name.replace('_', ' ')} must be {what}, found {value:g}")
        for name in ("iterations", "batch"):
            if getattr(self, name) < 1:
                raise CalibrationError(f"l2c: {name} must be 1 or more, found {getattr(self, name)}")
        if self.seed < 0:
            raise CalibrationError(f"l2c: the seed must be 0 or more, found {self.seed}")


class Follower:
    """Follows the samplings of a pipeline in pairs of steps, and changes nothing in them.

    The first step of a pair computes everything. In the second each call of the model is made twice: as it is, which
    is what the sampling goes on with, and mixed, where each site gives beta times what it makes now plus (1 - beta)
    times what it gave in the step before.

    Args:
        pipeline: Whose scheduler tells the steps.
        model: Its denoiser.
        anatomy: The model's.
        betas: Given the place of a pair, the betas of its second step, (sites,).
        learn: Given the place of a pair, the mean squared error of the mixed output, and its gradient with respect to
            the betas, (sites,), each the mean over the model's calls of the step. Called when the step has ended.
    """

    def __init__(
        self,
        pipeline: Any,
        model: nn.Module,
        anatomy: Anatomy,
        betas: Callable[[int], Tensor],
        learn: Callable[[int, float, Tensor], None],
    ) -> None:
        self._places = {key: place for place, key in enumerate(anatomy.sites)}
        self._betas, self._learn = betas, learn
        self._generation: Generation | None = None
        self._context: str | None = None
        self._act: Act | None = None
        self._found: list[tuple[float, Tensor]] = []  # of the calls of the step that runs
        self._names = PassNames(model, self._named)
        self._overrides = Overrides()
        self._overrides.set(model, self._model(model.forward, parameters_of(model)))
        for block in anatomy.blocks:
            for site in block.sites:
                branch = self._overrides.part(model, f"{block.module}.{site.module}")
                self._overrides.set(branch, self._site(block.key(site), branch.forward))
        self._clock = StepClock(pipeline.scheduler, self._begin, self._step)

    def detach(self) -> None:
        """Give the model and the scheduler their own methods back."""
        self._overrides.restore()
        self._clock.detach()
        self._names.detach()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def run(self, sampling: Callable[[], Any]) -> None:
        """Follow one sampling; what comes after its last step, such as decoding, is left out."""
        try:
            sampling()
        except _LastStepDone:
            pass
        finally:
            self._generation = None

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def _begin(self, scheduler: Any) -> None:
        self._generation = Generation(len(scheduler.timesteps))
        self._generation.begin_step()
        self._found.clear()

    def _step(self) -> None:
        generation = self._generation
        if generation is None:
            return
        if self._found:
            errors, gradients = zip(*self._found, strict=True)
            self._found.clear()
            self._learn(generation.step // 2, sum(errors) / len(errors), torch.stack(gradients).mean(dim=0))
        generation.begin_step()
        if generation.finished:
            raise _LastStepDone

    def _model(self, forward: Forward, names: Sequence[str]) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            generation = self._generation
            if generation is None:
                return forward(*args, **kwargs)
            self._overrides.rewind()
            call = Call(args, kwargs, names)
            _, lane = generation.lane(self._context, call)
            if generation.step % 2 == 0:
                with self._acting(_keeping(lane.entries)):
                    return forward(*args, **kwargs)
            returned = forward(*args, **kwargs)
            if lane.entries:  # a pass that was not there in the step before has nothing to hold
                betas = self._betas(generation.step // 2).detach().to(call.latents.device).requires_grad_()
                with torch.enable_grad(), self._acting(self._mixing(betas, lane.entries)):
                    mixed = forward(*args, **kwargs)
                    self._found.append(_error(mixed, returned, betas))
                lane.entries.clear()
            return returned

        return run

    def _mixing(self, betas: Tensor, entries: Mapping[Any, Any]) -> Act:
        def mix(key: str, out: Any) -> Any:
            beta = betas[self._places[key]]
            # At 0 and at 1, lerp gives the one or the other bit for bit.
            return each([entries[key], out], lambda parts: torch.lerp(parts[0], parts[1], beta.to(parts[1].dtype)))

        return mix

    @contextmanager
    def _acting(self, act: Act) -> Iterator[None]:
        self._act = act
        try:
            yield
        finally:
            self._act = None

    def _site(self, key: str, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            return out if self._act is None else self._act(key, out)

        return run


def _keeping(entries: dict[Any, Any]) -> Act:
    def keep(key: str, out: Any) -> Any:
        entries[key] = out
        return out

    return keep


class _LastStepDone(BaseException):  # past the pipeline's own `except Exception`
    pass


def _error(mixed: Any, full: Any, betas: Tensor) -> tuple[float, Tensor]:
    """Return the mean squared error of the model's output, and its gradient with respect to the betas, (sites,)."""
    one, two = next(tensors_of(mixed)), next(tensors_of(full))
    # The sum and not the mean goes backward: its small share in each element would vanish in half precision.
    squared = (one.float() - two.float()).square().sum()
    [gradient] = torch.autograd.grad(squared, betas)
    return squared.item() / one.numel(), gradient.float().cpu() / one.numel()


class _State:
    """The routers in training: logits, optimiser and the course of the loss."""

    def __init__(self, rows: int, sites: int, training: Training) -> None:
        self.training = training
        self.logits = [nn.Parameter(torch.zeros(sites)) for _ in range(rows)]  # beta 1/2: undecided
        self.optimizer = torch.optim.AdamW(self.logits, lr=training.learning_rate, weight_decay=0.0)
        self.course: list[Tensor] = []  # of each iteration, (rows, 2): squared error, and sum of the betas
        self._now = torch.zeros(rows, 2)

    def begin(self) -> None:
        self._now = torch.zeros_like(self._now)

    def betas(self, row: int) -> Tensor:
        return self.logits[row].detach().sigmoid()

    def learn(self, row: int, error: float, gradient: Tensor) -> None:
        """Update one router, with the gradient of the error with respect to its betas."""
        betas = self.betas(row)
        self._now[row] = torch.tensor([error, betas.sum().item()])
        if not (math.isfinite(error) and bool(gradient.isfinite().all())):
            raise CalibrationError(
                f"l2c: step {2 * row + 1} met a value that is not finite; the model's outputs or their gradients are "
                "beyond its precision, so train it in another --dtype"
            )
        self.logits[row].grad = (gradient + self.training.penalty) * betas * (1 - betas)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.logits[row].clamp_(-LIMIT, LIMIT)

    def end(self) -> None:
        self.course.append(self._now)

    def saved(self) -> dict[str, Any]:
        """Return a copy of all that the training goes on with."""
        logits = torch.stack([row.detach() for row in self.logits])
        return {"logits": logits, "optimizer": copy.deepcopy(self.optimizer.state_dict()), "course": list(self.course)}

    def go_on_with(self, logits: np.ndarray, optimizer: Mapping[str, Any], course: Tensor) -> None:
        with torch.no_grad():
            for row, values in zip(self.logits, logits, strict=True):
                row.copy_(torch.from_numpy(values))
        self.optimizer.load_state_dict(dict(optimizer))
        self.course = list(course)


def train(
    pipeline: Any,
    anatomy: Anatomy,
    target: Target,
    steps: int,
    conditions: Sequence[str],
    sampling: Sampling,
    training: Training,
    file: Path,
    *,
    progress: bool = True,
) -> Router:
    """Train a router and write its file, or go on with the one that is there.

    The loss of a pair of steps is the mean squared error between the model's output in the second one, computed in
    full, and mixed with what the branches gave in the first one, plus the penalty times the sum of the betas. The
    paper draws one pair at a time, from images with noise added; here each sampling, without guidance and with one
    sample in ten unconditional, goes through all pairs in turn. Since each step has a router of its own, and no
    router's loss depends on another, that draws the same pairs in another order, and needs no images.

    The state is written twice a minute and at the end. Conditions and noise of an iteration follow from the seed and
    its number alone, so that a training that was interrupted and resumed is bit for bit an undisturbed one.

    Args:
        pipeline: A diffusers pipeline.
        anatomy: Its denoiser's.
        target: What the router is for, in full.
        steps: As the step clock counts them.
        conditions: Prompts or classes to draw from.
        sampling: How the pipeline is called.
        training: The settings.
        file: Of the router, in the published format, with what is needed to go on.
        progress: Whether to show a bar on standard error.

    Raises:
        CalibrationError: If the steps do not go in pairs, the file holds something else, a value is not finite, or on
            Ctrl-C.
    """
    check_steps(steps)
    model = denoiser(pipeline)
    sampling = _unguided(model, sampling)
    state = _State(steps // 2, len(anatomy.sites), training)
    identity = {
        **{name: value for name, value in asdict(training).items() if name != "iterations"},
        **{name: value for name, value in asdict(sampling).items() if value is not None},
        "conditions": digest(list(conditions)),
        "scheduler_config": digest(config_of(pipeline.scheduler)),
    }
    if file.exists():
        _go_on(state, file, identity, anatomy, target)

    def write(saved: Mapping[str, Any]) -> None:
        args = {
            "format": FORMAT,
            "sites": list(anatomy.sites),
            "made_for": target.to_json(),
            "identity": identity,
            "told": _told(training, saved["course"]),
            "course": torch.stack(saved["course"]),
        }
        save_checkpoint(file, saved["logits"], saved["optimizer"], args)

    kept, at = state.saved(), time.monotonic()
    begun = len(state.course)
    bar = tqdm(total=training.iterations, initial=begun, desc="train router", unit="iteration", disable=not progress)
    try:
        with bar, _frozen(model), Follower(pipeline, model, anatomy, state.betas, state.learn) as follower:
            for number in range(begun, training.iterations):
                state.begin()
                asked, seeds = draw(conditions, training, number)
                follower.run(partial(sample, pipeline, asked, seeds, sampling))
                state.end()
                kept = state.saved()
                bar.set_postfix_str(_brief(state))
                bar.update()
                if time.monotonic() - at > SECONDS_BETWEEN_CHECKPOINTS:
                    write(kept)
                    at = time.monotonic()
    except KeyboardInterrupt:
        done = len(kept["course"])
        if done:
            write(kept)
        where = f", which are kept in {file}; the same command goes on with them" if done else ""
        raise CalibrationError(f"interrupted after {done} of {training.iterations} iterations{where}") from None
    if len(state.course) > begun:
        write(kept)
    return read_router(file)


def draw(conditions: Sequence[str], training: Training, number: int) -> tuple[list[str], list[int]]:
    """Return the conditions and the seeds of an iteration, as they follow from its number."""
    generator = np.random.default_rng([training.seed, number])
    chosen = generator.integers(len(conditions), size=training.batch)
    dropped = generator.random(training.batch) < LABEL_DROPOUT
    seeds = generator.integers(2**31, size=training.batch)
    asked = [UNCONDITIONAL if drop else conditions[i] for i, drop in zip(chosen, dropped, strict=True)]
    return asked, [int(seed) for seed in seeds]


def _unguided(model: nn.Module, sampling: Sampling) -> Sampling:
    """Return the same without guidance, unless the scale is an argument of the model."""
    if sampling.guidance is None or getattr(model, "config", {}).get("guidance_embeds"):
        return sampling
    return replace(sampling, guidance=min(1.0, sampling.guidance))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no gradient reach the model's weights."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _go_on(state: _State, file: Path, identity: Mapping[str, Any], anatomy: Anatomy, target: Target) -> None:
    """Read where a training stands that was begun with the same settings."""
    elsewhere = "choose another --output or --save-router"
    content = load_checkpoint(file)
    args = content["args"]
    if not is_ours(args):
        raise CalibrationError(f"{file} is there, and holds a router that was not trained here; {elsewhere}")
    begun = {**args["identity"], "sites": args["sites"], **args["made_for"]}
    wanted = {**identity, "sites": list(anatomy.sites), **target.to_json()}
    differing = [name for name in sorted({*begun, *wanted}) if begun.get(name) != wanted.get(name)]
    if differing:
        told = [
            f"{name.replace('_', ' ')} {begun.get(name)}, now {wanted.get(name)}"
            if isinstance(begun.get(name, 0), (int, float)) and isinstance(wanted.get(name, 0), (int, float))
            else f"other {name.replace('_', ' ')}"
            for name in differing
        ]
        raise CalibrationError(f"{file} holds a training with other settings: {'; '.join(told)}; {elsewhere}")
    done, asked = len(args["course"]), state.training.iterations
    if done > asked:
        raise CalibrationError(f"{file} holds {done} iterations, more than {asked}; ask for {done}, or {elsewhere}")
    state.go_on_with(read_router(file).logits, content["opt"], args["course"])


def _told(training: Training, course: Sequence[Tensor]) -> dict[str, Any]:
    """Return what a schedule says of the training: its settings, and its loss at the start and at the end."""
    loss = torch.stack(list(course)).double().mean(dim=1)  # (iterations, 2): error and sum of the betas of a step
    ends = max(1, len(loss) // 10)
    told: dict[str, Any] = {**asdict(training), "iterations": len(loss), "label_dropout": LABEL_DROPOUT}
    for name, part in (("first_tenth", loss[:ends]), ("last_tenth", loss[-ends:])):
        error, betas = part.mean(dim=0).tolist()
        told[name] = {"error": error, "sum_of_betas": betas, "loss": error + training.penalty * betas}
    return told


def _brief(state: _State) -> str:
    error, betas = state.course[-1].double().mean(dim=0).tolist()
    return f"error {error:.2e}, mean beta {betas / len(state.logits[0]):.2f}"
