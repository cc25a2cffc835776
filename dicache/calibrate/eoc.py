"""EOC: correct what a plan holds by how the branch's mean output is known to change."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from dicache.anatomy.parts import BRANCHES, block_of, branch_of, kind_of_branch
from dicache.calibrate.methods import Axis, Between, CalibrationError, method
from dicache.calibrate.spaces import ProfileSpace
from dicache.profiler import Profile
from dicache.schedules import Corrections, Schedule
from dicache.schedules.corrections import Form, name_of
from dicache.schedules.plan import HOLD

WEIGHTS = Between(1e-4, 0.3, log=True)  # that a search tries; the published ones are 0.005 and 0.01
HIGHEST_SCORE = 2.0  # of the trend and of the position each at most 1, with a position weight of 1

Prior = Callable[[str], tuple[tuple[int, ...], np.ndarray]]
Pair = tuple[str, str, int]  # guidance pass, site, step


@method("eoc")
@dataclass(frozen=True)
class Eoc:
    """Correct the outputs that a plan holds by their trend: the prior of the step less that of the step held.

    A prior is the mean output of a site at a step over many runs, of each guidance pass and of each half of its batch
    by itself. A block is corrected at a step if its score, `trend / largest trend + position_weight * t / steps`,
    exceeds the threshold, where the trend is the mean absolute one of its branches, added up, and t counts the steps
    down. The paper's own equations for this could only be followed in words.

    Attributes:
        weight: Of the trend; 0.01 in the paper on masks like FORA's, 0.005 on a learned router. It depends on the
            model's scale: `multiply` is quadratic in it.
        form: `multiply`, C * (1 + weight * T); or `add`, C + weight * T, which the paper found worse.
        first_steps: Only the first so many steps of the generation are corrected; None for all. To correct all was
            harmful in the paper.
        position_weight: Of the position in the score: earlier steps need it more.
        threshold: Of the score.
        branches: Kinds of branch that are corrected; all of them when empty. One alone was worse than none.

    References:
        EOC, arXiv 2501.19243, section 3.
    """

    weight: float = 0.01
    form: Form = "multiply"
    first_steps: int | None = None
    position_weight: float = 1.0
    threshold: float = 0.0
    branches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("weight", "position_weight", "threshold"):
            if not math.isfinite(getattr(self, name)):
                raise CalibrationError(
                    f"eoc: the {name.replace('_', ' ')} must be a number, found {getattr(self, name)}"
                )
        if self.form not in get_args(Form):
            raise CalibrationError(f"eoc: the form must be multiply or add, found {self.form!r}")
        if self.first_steps is not None and self.first_steps < 1:
            raise CalibrationError(f"eoc: the first steps to correct must be 1 or more, found {self.first_steps}")
        if unknown := sorted(set(self.branches) - set(BRANCHES)):
            raise CalibrationError(f"eoc: unknown branch {unknown[0]!r}; write one of {', '.join(BRANCHES)}")

    def calibrate(self, profile: Profile, base: Schedule, prior: Prior) -> Schedule:
        """Return the base schedule with corrections.

        Args:
            profile: Of the model and the sampler that the base is for.
            base: Holds the outputs of branches.
            prior: Given a site, the steps that there are priors of, and the priors, (parts of all guidance passes,
                steps, tokens, channels).

        Raises:
            CalibrationError: If the base holds nothing or is for something else, or there are no priors for it.
        """
        _check(profile, base)
        pairs = self._pairs(profile, base)
        if not pairs:
            raise CalibrationError(
                f"eoc: the {base.method} schedule holds no output of a branch that is to be corrected; take a base "
                "such as FORA's, or correct other branches or more steps"
            )
        trends = _trends(profile, pairs, prior)
        scores = self._scores(profile, trends)
        chosen = {place for place, score in scores.items() if score > self.threshold}
        if not chosen:
            raise CalibrationError(
                f"eoc: no score exceeds the threshold {self.threshold:g}; the largest is {max(scores.values()):.3g}"
            )
        kind = np.float32 if profile.provenance.target.dtype in (None, "float32", "float64") else np.float16
        tensors = {name_of(*pair): trend.astype(kind) for pair, trend in trends.items() if _place(pair) in chosen}
        sites = {
            key: "".join("." if (block_of(key), i) in chosen and (key, i) in pairs else "C" for i in range(base.steps))
            for key in profile.anatomy.sites
        }
        provenance = profile.provenance
        return Schedule(
            method="eoc",
            settings={**vars(self), "branches": list(self.branches), "base": base.method, **_of(base)},
            anatomy=profile.anatomy,
            target=provenance.target,
            steps=base.steps,
            plan=base.plan,
            corrections=Corrections(
                self.form,
                self.weight,
                dict(zip(provenance.contexts, provenance.parts, strict=True)),
                {key: letters for key, letters in sites.items() if "." in letters},
                tensors,
            ),
            measured={
                "model": provenance.model,
                "runs": sum(run.ok for run in profile.runs),
                "guidance": provenance.settings.get("guidance"),
                "corrected": len({(site, step) for _, site, step in trends if (block_of(site), step) in chosen}),
                "held": len(_held(profile, base)),
                "correction_bytes": sum(tensor.nbytes for tensor in tensors.values()),
                "largest_score": max(scores.values()),
            },
        )

    def _pairs(self, profile: Profile, base: Schedule) -> dict[tuple[str, int], dict[str, int]]:
        """Return the sites and steps that may be corrected, with the step held there in each guidance pass."""
        last = base.steps if self.first_steps is None else self.first_steps
        return {
            (site, step): sources
            for (site, step), sources in _held(profile, base).items()
            if step < last and (not self.branches or kind_of_branch(branch_of(site)) in self.branches)
        }

    def _scores(self, profile: Profile, trends: dict[Pair, np.ndarray]) -> dict[tuple[int, int], float]:
        """Return the score of each block and step."""
        sizes: dict[tuple[int, int], float] = {}
        for pair, trend in trends.items():
            mean = float(np.abs(trend).mean()) / len(profile.provenance.contexts)
            sizes[_place(pair)] = sizes.get(_place(pair), 0.0) + mean
        largest = max(sizes.values()) or 1.0
        steps = profile.steps
        return {
            (block, step): size / largest + self.position_weight * (steps - 1 - step) / steps
            for (block, step), size in sizes.items()
        }


def _held(profile: Profile, base: Schedule) -> dict[tuple[str, int], dict[str, int]]:
    """Return the sites and steps that are held in every guidance pass, with the step held there in each."""
    assert base.plan is not None
    found: dict[tuple[str, int], dict[str, int]] = {}
    for context in profile.provenance.contexts:
        stand_ins = base.plan.stand_ins(base.anatomy, context)
        for site, letters in base.plan.table(base.anatomy, context).items():
            for step, letter in enumerate(letters):
                if letter == "R" and stand_ins[site][step] == HOLD:
                    found.setdefault((site, step), {})[context] = letters.rindex("C", 0, step)
    return {pair: sources for pair, sources in found.items() if len(sources) == len(profile.provenance.contexts)}


def _trends(profile: Profile, pairs: dict[tuple[str, int], dict[str, int]], prior: Prior) -> dict[Pair, np.ndarray]:
    """Return the trend of each guidance pass, site and step, (parts, tokens, channels)."""
    provenance = profile.provenance
    ends = np.cumsum(provenance.parts)
    rows = {
        context: slice(end - parts, end)
        for context, parts, end in zip(provenance.contexts, provenance.parts, ends.tolist(), strict=True)
    }
    trends: dict[Pair, np.ndarray] = {}
    for site in dict.fromkeys(site for site, _ in pairs):
        steps, means = prior(site)
        place = {step: k for k, step in enumerate(steps)}
        for (key, step), sources in pairs.items():
            for context, source in sources.items() if key == site else ():
                if missing := [i for i in (source, step) if i not in place]:
                    raise CalibrationError(
                        f"eoc: the profile has no prior of {site} at step {missing[0]}; profile again with --priors, "
                        "or with --priors-for and the base schedule"
                    )
                trends[context, site, step] = means[rows[context], place[step]] - means[rows[context], place[source]]
    return trends


def _check(profile: Profile, base: Schedule) -> None:
    if base.plan is None:
        raise CalibrationError(f"eoc: the base must have a plan, but {base.method} decides at run time")
    if base.corrections is not None:
        raise CalibrationError("eoc: the base is corrected already; take the schedule that it was made from")
    if differences := profile.differences(base):
        raise CalibrationError(
            f"eoc: the base schedule was made for {'; '.join(differences)} in the profile. Profile the model and the "
            "sampler that the base is for"
        )


def _of(base: Schedule) -> dict[str, Any]:
    return {f"base_{name}": value for name, value in base.settings.items() if value is not None}


def _place(pair: Pair) -> tuple[int, int]:
    """Return the block and the step."""
    return block_of(pair[1]), pair[2]


@dataclass(frozen=True)
class EocSpace(ProfileSpace):
    """The weight of the trend, the score above which a block is corrected, and in how many first steps.

    What is computed is the base's in all of them.

    Attributes:
        base: The schedule that is corrected.
        prior: Of a site, as `Eoc.calibrate` takes it.
    """

    base: Schedule = field(kw_only=True)
    prior: Prior = field(kw_only=True)

    def free(self) -> Mapping[str, Axis]:
        return {
            "weight": WEIGHTS,
            "threshold": Between(0.0, HIGHEST_SCORE),
            "first_steps": range(1, self.steps + 1),
            "form": get_args(Form),
        }

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**super().identity, "base": self.base.to_json()["plan"]}

    def usual(self) -> Mapping[str, Any]:
        return {**super().usual(), "first_steps": self.settings.first_steps or self.steps}

    def plain(self, max_macs: float | None) -> Mapping[str, Any]:
        return super().plain(None)

    def made(self, settings: Eoc) -> Schedule:
        return settings.calibrate(self.profile, self.base, self.prior)
