"""Learning-to-Cache: a router says which branches every second step computes; the others hold the step before."""

import argparse
import hashlib
import itertools
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicache.anatomy import Anatomy
from dicache.anatomy.parts import block_of, span
from dicache.calibrate.methods import CalibrationError, method
from dicache.schedules import Plan, Rule, Schedule, Target
from dicache.schedules.plan import ACT, COMPUTE
from dicache.schedules.replacing import replacing

KEYS = {"routers", "opt", "args"}  # of a published file
FORMAT = "dicache.router/1"  # stands in the args of one that was trained here
OURS = {"format", "sites", "made_for", "identity", "told", "course"}  # all that stands there
LIMIT = 5.0  # of a logit, as in the released code


@dataclass(frozen=True)
class Router:
    """What was learned for each branch at every second step.

    Attributes:
        logits: Of computing, (steps / 2, sites), for the steps 1, 3, 5, ...
        sites: Keys of the sites in the order of the logits; None where the file does not say, as in the published
            ones: there it is attention and MLP of each block in turn.
        target: What it was trained for; a published file says nothing of it.
        told: Where it is from and how it was trained.
    """

    logits: np.ndarray
    sites: tuple[str, ...] | None
    target: Target
    told: Mapping[str, Any]

    @property
    def steps(self) -> int:
        return 2 * len(self.logits)

    @property
    def betas(self) -> np.ndarray:
        """How much of each branch is to be computed, from 0 to 1, (steps / 2, sites)."""
        return np.asarray(1 / (1 + np.exp(-self.logits.astype(np.float64))))


@method("l2c")
@dataclass(frozen=True)
class LearningToCache:
    """Compute every branch at the steps 0, 2, 4, ..., and in between those whose beta exceeds the threshold.

    Attributes:
        threshold: Of beta, the sigmoid of the router's logit, from 0 to 1; 0.1 for most of the published routers, 0.9
            for the one of 512 x 512 pixels.

    References:
        Learning-to-Cache, arXiv 2406.01733, section 3; horseee/learning-to-cache.
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise CalibrationError(
                f"l2c: the threshold must be from 0 (all is computed) to 1, found {self.threshold:g}; 0.1 is usual"
            )

    def schedule(self, router: Router, anatomy: Anatomy, target: Target, steps: int, model: str) -> Schedule:
        """Return the schedule that a router gives.

        Args:
            router: Of the model.
            anatomy: The model's.
            target: What the schedule is bound to.
            steps: As the step clock counts them.
            model: Its name.

        Raises:
            CalibrationError: If the router is for another model or another number of steps.
        """
        check_steps(steps)
        check_fit(router, anatomy, target, steps)
        computed = router.betas > self.threshold  # (steps / 2, sites)
        rows = {
            key: "".join(letter for each in computed[:, place] for letter in (COMPUTE, COMPUTE if each else ACT))
            for place, key in enumerate(anatomy.sites)
        }
        return Schedule(
            method="l2c",
            settings=asdict(self),
            anatomy=anatomy,
            target=target,
            steps=steps,
            plan=Plan(steps, rules_of(rows, anatomy)),
            measured={
                "model": model,
                "held": int((~computed).sum()),
                "held_share": float((~computed).sum() / (steps * len(anatomy.sites))),
                **router.told,
            },
        )


def check_steps(steps: int) -> None:
    """Raise CalibrationError unless steps go in pairs."""
    if steps < 2 or steps % 2:
        raise CalibrationError(
            f"l2c: steps go in pairs, so that there must be an even number of them, 2 or more, found {steps}; "
            f"sample in {max(2, steps + 1)} steps"
        )


def check_fit(router: Router, anatomy: Anatomy, target: Target, steps: int) -> None:
    """Raise CalibrationError unless a router is for this model and number of steps."""
    if router.steps != steps:
        raise CalibrationError(
            f"l2c: the router is for {router.steps} steps, the schedule for {steps}; sample in {router.steps} steps, "
            "or take a router for this number"
        )
    many = router.logits.shape[1]
    if router.sites is None:
        kinds = [[site.branch for site in block.sites] for block in anatomy.blocks]
        if odd := [index for index, branches in enumerate(kinds) if branches != ["attn", "mlp"]]:
            raise CalibrationError(
                f"l2c: the router is for blocks of an attention and an MLP, but block {odd[0]} of this {anatomy.model} "
                f"has {', '.join(kinds[odd[0]])}; train one for it with --train"
            )
        if many != len(anatomy.sites):
            raise CalibrationError(
                f"l2c: the router is for {many / 2:g} blocks ({many} logits a step), but this {anatomy.model} has "
                f"{len(kinds)}; take the router of this model, or train one with --train"
            )
    elif router.sites != anatomy.sites:
        theirs = len({block_of(key) for key in router.sites})
        raise CalibrationError(
            f"l2c: the router is for {theirs} blocks with {len(router.sites)} branches, but this {anatomy.model} has "
            f"{len(anatomy.blocks)} with {len(anatomy.sites)} or others; take the router of this model, or train one "
            "with --train"
        )
    known = {**vars(target), "guidance": None}  # it is trained on single passes
    if differences := router.target.differences(**known):
        raise CalibrationError(
            f"l2c: the router was trained for {'; '.join(differences)}; train one for this model and sampler"
        )


def rules_of(rows: Mapping[str, str], anatomy: Anatomy) -> tuple[Rule, ...]:
    """Return the rules that reuse each site where its row has a dot; neighbouring blocks of equal rows share one."""
    rules = []
    for branch in dict.fromkeys(site.branch for block in anatomy.blocks for site in block.sites):
        runs: list[list[int]] = []
        having = [block for block in anatomy.blocks if any(site.branch == branch for site in block.sites)]
        for block in having:
            follows = runs and runs[-1][-1] == block.index - 1
            if follows and rows[f"{runs[-1][-1]}.{branch}"] == rows[f"{block.index}.{branch}"]:
                runs[-1].append(block.index)
            else:
                runs.append([block.index])
        for run in runs:
            row = rows[f"{run[0]}.{branch}"]
            others = {site.branch for index in run for site in anatomy.blocks[index].sites} - {branch}
            alone = f"{branch}." if any(other.startswith(f"{branch}.") for other in others) else branch
            if ACT in row:
                rules.append(Rule("reuse", row, span(run[0], run[-1]), alone))
    return tuple(rules)


def read_router(path: Path) -> Router:
    """Read a router: one of the published files, or one that was trained here. Nothing in the file is executed.

    Published are the logits of each respaced index, 0 for the last step, in `routers` as `<index>.prob`, attention and
    MLP of each block in turn. Those of odd indices were never trained, and are not looked at.

    Raises:
        CalibrationError: If it is no such file, is cut off, or holds a logit that is not finite.
    """
    content = load_checkpoint(path)
    routers = content["routers"]
    numbers = [re.fullmatch(r"(\d+)\.prob", str(key), re.ASCII) for key in routers]
    found = sorted(int(match[1]) for match in numbers if match)
    if not found or len(found) < len(numbers) or found != list(range(len(found))):
        raise CalibrationError(
            f"{path}: the keys of its routers must be 0.prob, 1.prob, ..., one a step, found "
            f"{', '.join(itertools.islice(map(str, routers), 3)) or 'none'}, ..., {len(routers)} in all; "
            "take a file of Learning-to-Cache"
        )
    if len(found) % 2:
        raise CalibrationError(f"{path}: holds routers of {len(found)} steps, but these go in pairs; take another file")
    trained = [routers[f"{index}.prob"] for index in reversed(found[::2])]  # of the steps 1, 3, 5, ...
    shapes = {tuple(row.shape) if isinstance(row, torch.Tensor) else None for row in trained}
    if len(shapes) > 1 or len(shape := shapes.pop() or ()) != 1 or not shape[0]:
        raise CalibrationError(f"{path}: its routers are not one row of logits each, all of one length; take another")
    logits = torch.stack([row.float() for row in trained]).numpy()
    if not np.isfinite(logits).all():
        row, place = np.argwhere(~np.isfinite(logits))[0]
        raise CalibrationError(
            f"{path}: logit {place} of {2 * (len(logits) - 1 - row)}.prob is {logits[row, place]}, needed a finite "
            "number; get the file again, or train the router again"
        )
    args = content["args"]
    if not is_ours(args):
        return Router(logits, None, Target(), _source(path, args))
    return Router(logits, tuple(args["sites"]), Target.from_json(args["made_for"]), _source(path, args))


def _source(path: Path, args: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"router": path.name, "router_sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
    if is_ours(args):
        return {**told, **args["told"]}
    for name, ours in (("l1", "penalty"), ("lr", "learning_rate")):  # as the released training calls them
        value = getattr(args, name, None)
        if isinstance(value, (int, float)) and math.isfinite(value):
            told[ours] = float(value)
    return told


def is_ours(args: Any) -> bool:
    """Whether the args of a file were written here."""
    return isinstance(args, Mapping) and args.get("format") == FORMAT


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a file of routers holds: tensors, plain values, and an argparse.Namespace; nothing else is built.

    Raises:
        CalibrationError: If it is missing, cut off, holds anything else, or is not of this kind.
    """
    try:
        path.open("rb").close()  # raises where there is no file
        if not zipfile.is_zipfile(path):
            raise CalibrationError(f"{path} is no torch checkpoint, or was cut off; get the file again")
        with _namespace_allowed():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CalibrationError(f"{path} does not exist; needed a file of routers, or --train to make one") from None
    except IsADirectoryError:
        raise CalibrationError(f"{path} is a folder; needed a file of routers") from None
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise CalibrationError(
            f"{path} holds {name[1] if name else 'something'}, which is neither a tensor nor a plain value, and was "
            "not loaded; take a file of Learning-to-Cache from a source that you trust"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"{path} cannot be read as a torch checkpoint; get the file again") from None
    if not isinstance(content, dict) or not content.keys() >= KEYS or not isinstance(content["routers"], Mapping):
        found = (
            ", ".join(map(str, itertools.islice(content, 5))) if isinstance(content, dict) else type(content).__name__
        )
        raise CalibrationError(
            f"{path} holds {found or 'nothing'}, needed {', '.join(sorted(KEYS))}; take a file of Learning-to-Cache"
        )
    if is_ours(content["args"]) and (missing := sorted(OURS - content["args"].keys())):
        raise CalibrationError(f"{path}: its args have no {missing[0]}; train the router again")
    return content


@contextmanager
def _namespace_allowed() -> Iterator[None]:
    """Let torch's restricted unpickler build what the published files keep their arguments in."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def save_checkpoint(path: Path, logits: torch.Tensor, optimizer: Mapping[str, Any], args: Mapping[str, Any]) -> None:
    """Write routers in the published format, in one go. Those of the steps that compute everything say so.

    Args:
        path: The file.
        logits: (steps / 2, sites), for the steps 1, 3, 5, ...
        optimizer: Its state.
        args: How it was trained, and for what.
    """
    full = torch.full_like(logits[0], LIMIT)
    routers: dict[str, torch.Tensor] = {}
    for pair, row in enumerate(reversed(logits)):
        routers |= {f"{2 * pair}.prob": row.clone(), f"{2 * pair + 1}.prob": full.clone()}
    with replacing(path) as part:
        torch.save({"routers": routers, "opt": optimizer, "args": dict(args)}, part)
