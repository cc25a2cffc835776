"""The schedule file: what to compute, for which model and sampler, and how that was found."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dicache.anatomy.parts import Anatomy, AnatomyError
from dicache.schedules.corrections import Corrections
from dicache.schedules.documents import DocumentError, parse, read_text, shortened, wrong_format
from dicache.schedules.plan import ACT, COMPUTE, MAX_STEPS, Plan, PlanError, Rule
from dicache.schedules.policies import Policy, read_policy
from dicache.schedules.replacing import replacing
from dicache.schedules.rows import Rows
from dicache.schedules.target import ScheduleError, Target

FORMAT = "dicache.schedule/1"
MAX_MAPPED_ORDER = 2  # of the Taylor expansion in the place of a forecast at other steps; higher ones are unsafe


@dataclass(frozen=True)
class Schedule:
    """A plan or a policy, with all that is needed to replay it and to know whether it fits.

    Attributes:
        method: Name of the method that made it.
        settings: The method's settings.
        anatomy: The model's blocks and sites.
        target: What it was made for.
        steps: Number of steps, as the step clock counts them.
        plan: What is computed, if that is known beforehand.
        policy: The rule that decides at run time, if it is not.
        measured: What calibration found: fit quality, the profile it came from, the simulated outcome.
        corrections: What outputs that the plan holds are corrected by; their tensors lie in a file beside the JSON.
    """

    method: str
    settings: Mapping[str, Any]
    anatomy: Anatomy
    target: Target
    steps: int
    plan: Plan | None = None
    policy: Policy | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    corrections: Corrections | None = None

    def __post_init__(self) -> None:
        if (self.plan is None) == (self.policy is None):
            raise ScheduleError("a schedule has either a plan or a policy")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ScheduleError(f"a schedule needs at least one step, and no more than {MAX_STEPS}; found {self.steps}")
        if not self.anatomy.sites:
            raise ScheduleError(f"a schedule needs a model with at least one site, found none in {self.anatomy.model}")
        if self.policy is not None and self.anatomy.links:
            raise ScheduleError(
                f"a policy decides in the first block whether to skip a row of blocks, and {self.anatomy.model} is a "
                "U-Net; needed a plan, such as that of `dicache calibrate deepcache`"
            )
        if self.policy is not None:
            self.policy.skipped(self.anatomy)  # raises if it does not fit the model
        if self.plan is not None:
            if self.plan.steps != self.steps:
                raise ScheduleError(f"the plan has {self.plan.steps} steps, the schedule {self.steps}")
            self.plan.check_size(self.anatomy)
            for context in (None, *self.plan.contexts):
                self.plan.table(self.anatomy, context)  # raises if it does not fit the model
                if any(rule.weights for rule in self.plan.rules):
                    Rows(self.plan, self.anatomy, context)  # raises if a forecast is of other steps than are computed
        if self.corrections is not None:
            if self.plan is None:
                raise ScheduleError("corrections are of outputs that a plan holds, but the schedule has a policy")
            if self.plan.collapse_guidance_from is not None:
                raise ScheduleError(
                    "corrections are of the single guidance passes, but the plan lets guidance collapse from step "
                    f"{self.plan.collapse_guidance_from} on; a schedule can do one of the two"
                )
            self.corrections.check(self.plan, self.anatomy)
        expected = self.measured.get("expected_steps", COMPUTE * self.steps)
        letters = isinstance(expected, str) and len(expected) == self.steps and not set(expected) - {COMPUTE, ACT}
        if not letters or expected.startswith(ACT):
            raise ScheduleError(
                f"measured: expected_steps must be {self.steps} letters C or ., the first of them C, found {expected!r}"
            )
        fraction = self.measured.get("macs_fraction", 1.0)
        if not isinstance(fraction, (int, float)) or isinstance(fraction, bool) or fraction < 0:
            raise ScheduleError(f"measured: macs_fraction must be a number of 0 or more, found {fraction!r}")

    @property
    def adaptive(self) -> bool:
        return self.policy is not None

    def table(self, context: str | None = None) -> dict[str, str]:
        """Return, for every site, a letter a step: C computed, R reused, S skipped.

        Of a policy it is what the calibration foresaw on its own runs, where it did, else all computed.
        """
        if self.plan is not None:
            return self.plan.table(self.anatomy, context)
        assert self.policy is not None
        start, stop = self.policy.skipped(self.anatomy)
        expected = self.measured.get("expected_steps", COMPUTE * self.steps)
        return {
            block.key(site): expected.replace(ACT, "S") if start <= block.index < stop else COMPUTE * self.steps
            for block in self.anatomy.blocks
            for site in block.sites
        }

    @property
    def expected_steps(self) -> str:
        """A letter a step: C all computed, `.` not all, in the passes without rules of their own; empty if unknown."""
        if not self.foreseen:
            return ""
        rows = zip(*self.table().values(), strict=True)
        return "".join(COMPUTE if set(row) == {COMPUTE} else ACT for row in rows)

    @property
    def foreseen(self) -> bool:
        """Whether it is known beforehand what is computed: from the plan, or from what a calibration expected."""
        return self.plan is not None or "expected_steps" in self.measured

    @property
    def contexts(self) -> tuple[str, ...]:
        """Guidance passes that the plan treats differently from the others."""
        return () if self.plan is None else self.plan.contexts

    @property
    def collapse_guidance_from(self) -> int | None:
        """The step from which on one guidance pass stands for both, if the plan has one."""
        return None if self.plan is None else self.plan.collapse_guidance_from

    def macs_fraction(self, context: str | None = None, *, guided: bool = True) -> float:
        """Return the share of the model's multiply-accumulates that is computed in a guidance pass.

        Passes are told apart only while they run, and how many there are is up to the pipeline, so a plan that treats
        some of them differently has no share of a whole generation: it has one for each of its `contexts`, and one for
        all others. Of a policy it is what the calibration expected, else 1.

        Args:
            context: The guidance pass; None is for those that the plan has no rules of their own for.
            guided: Whether a step has two passes, so that one of them is saved where the plan lets guidance collapse;
                the share is then that of both together.
        """
        if self.plan is None:
            return float(self.measured.get("macs_fraction", 1.0))
        table, stop = self.plan.table(self.anatomy, context), self.plan.collapse_guidance_from
        whole = macs_fraction(self.anatomy, table)
        if stop is None or not guided:
            return whole
        second = macs_fraction(self.anatomy, {key: letters[:stop] for key, letters in table.items()})
        return (whole + second * stop / self.steps) / 2

    def resampled(self, noise_levels: tuple[float, ...], num_inference_steps: int | None) -> "Schedule":
        """Return the schedule for another number of steps.

        What the plan does at a step it does at the new step whose noise level is nearest; where several meet, only what
        all of them leave out is left out. A policy decides at run time and only counts its steps anew. The weights of a
        forecast are for its own steps; a Taylor expansion takes its place.

        Raises:
            ScheduleError: If the schedule does not say at which noise levels it was made, or has corrections, which
                are differences between two steps of its own.
        """
        if self.corrections is not None:
            raise ScheduleError(
                f"the schedule corrects what it holds by what was measured at its own {self.steps} steps, which cannot "
                f"be mapped to {len(noise_levels)}; calibrate for this step count instead"
            )
        if self.target.noise_levels is None:
            raise ScheduleError(
                f"the schedule does not say its noise levels, so its {self.steps} steps cannot be mapped to "
                f"{len(noise_levels)}; calibrate for this step count instead"
            )
        plan = None if self.plan is None else _resampled(self.plan, self.target.noise_levels, noise_levels)
        target = Target(
            **{
                **vars(self.target),
                "num_inference_steps": num_inference_steps,
                "timesteps": None,
                "noise_levels": tuple(noise_levels),
            }
        )
        measured = {"resampled_from_steps": self.steps}
        steps = len(noise_levels)
        return Schedule(self.method, self.settings, self.anatomy, target, steps, plan, self.policy, measured)

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "format": FORMAT,
            "method": self.method,
            "settings": dict(self.settings),
            "steps": self.steps,
            "made_for": self.target.to_json(),
        }
        if self.plan is not None:
            content["plan"] = self.plan.to_json()
        if self.policy is not None:
            content["policy"] = self.policy.to_json()
        if self.corrections is not None:
            content["corrections"] = self.corrections.to_json()
        return {**content, "measured": dict(self.measured), "anatomy": self.anatomy.to_json()}

    @classmethod
    def from_json(cls, content: Any, folder: Path | None = None) -> "Schedule":
        """Read a schedule.

        Args:
            content: As `to_json` returns it.
            folder: Where the file of its corrections is, if it has any.

        Raises:
            ScheduleError: If a key is unknown or missing, or a value contradicts another.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            told = content if isinstance(content, Mapping) else {"format": type(content).__name__}
            raise ScheduleError(f"not a schedule: {wrong_format(told.get('format'), FORMAT, told.get('dicache'))}")
        keys = {"format", "method", "settings", "steps", "made_for", "measured", "anatomy"}
        given = set(content) - {"plan", "policy", "corrections"}
        if wrong := sorted(keys ^ given):
            kind = "unknown" if wrong[0] in given else "missing"
            raise ScheduleError(f"{kind} key {wrong[0]!r}; the keys are {', '.join(sorted(keys))}, and plan or policy")
        for name, kind_of in (("method", str), ("settings", Mapping), ("steps", int), ("measured", Mapping)):
            if not isinstance(content[name], kind_of) or isinstance(content[name], bool):
                raise ScheduleError(f"{name} cannot be {content[name]!r}")
        try:
            return cls(
                method=content["method"],
                settings=content["settings"],
                anatomy=Anatomy.from_json(content["anatomy"]),
                target=Target.from_json(content["made_for"]),
                steps=content["steps"],
                plan=Plan.from_json(content["plan"]) if "plan" in content else None,
                policy=read_policy(content["policy"]) if "policy" in content else None,
                measured=content["measured"],
                corrections=Corrections.from_json(content["corrections"], folder) if "corrections" in content else None,
            )
        except (PlanError, AnatomyError) as error:
            raise ScheduleError(str(error)) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file in one go: a reader sees the old one or the new one, never a part.

        The tensors of corrections go into a file beside it, of the same name but for its ending (`.safetensors`, or
        `.new.safetensors` if a schedule is replaced that has the other).
        """
        path = Path(path)
        content, before = self.to_json(), _tensors_of(path)
        beside = None
        if self.corrections is not None:
            stem = path.name.removesuffix(".json")
            beside = path.with_name(f"{stem}.safetensors")
            if beside == before:  # which the old schedule needs until the new one is there
                beside = path.with_name(f"{stem}.new.safetensors")
            content["corrections"]["file"] = beside.name
        text = dump(content) + "\n"
        if self.corrections is not None and beside is not None:
            with replacing(beside) as part:
                self.corrections.write(part)
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
        if before is not None and before != beside:
            before.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Schedule":
        """Read a schedule file.

        Raises:
            ScheduleError: If the file is missing, is not JSON, or is not a schedule.
        """
        try:
            return cls.from_json(parse(read_text(Path(path))), Path(path).parent)
        except FileNotFoundError:
            raise ScheduleError(f"{path} does not exist; make a schedule with `dicache calibrate`") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ScheduleError(f"{path} is not JSON ({error}); was it cut off? Calibrate again") from None
        except IsADirectoryError:
            raise ScheduleError(f"{path} is a folder; needed a schedule file") from None
        except (ScheduleError, DocumentError) as error:
            raise ScheduleError(f"{path}: {shortened(error)}") from None


def _tensors_of(path: Path) -> Path | None:
    """Return where the corrections of a schedule lie that is to be replaced; None if it has none of its own."""
    try:
        name = parse(read_text(path))["corrections"]["file"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    stem = path.name.removesuffix(".json")
    return path.with_name(name) if name in (f"{stem}.safetensors", f"{stem}.new.safetensors") else None


def _resampled(plan: Plan, mine: tuple[float, ...], theirs: tuple[float, ...]) -> Plan:
    """Return the plan for the noise levels `theirs`, falling, instead of `mine`."""
    old, new = np.asarray(mine), np.asarray(theirs)
    nearest = np.abs(old[:, None] - new[None, :]).argmin(axis=1)  # new step of each old one
    collapsed = plan.steps if plan.collapse_guidance_from is None else plan.collapse_guidance_from
    acting = [i for i in range(plan.steps) if i >= collapsed or any(rule.steps[i] == ACT for rule in plan.rules)]

    def comes_from(step: int) -> list[int]:
        """Return the old steps that a new step stands for; none if it is to compute."""
        if here := np.flatnonzero(nearest == step).tolist():
            return list(here)
        # No old step is nearest to it: it lies between two, and leaves out what one of them does.
        before = max(int((old >= new[step]).sum()) - 1, 0)
        beside = [i for i in (before, before + 1) if i in acting]
        return sorted(beside, key=lambda i: abs(old[i] - new[step]))[:1]

    sources = [comes_from(step) if step else [] for step in range(len(new))]  # the first step has nothing to reuse

    def mapped(rule: Rule) -> Rule:
        letters = "".join(ACT if s and all(rule.steps[i] == ACT for i in s) else COMPUTE for s in sources)
        if rule.predictor != "forecast":
            return replace(rule, steps=letters)
        order = min(MAX_MAPPED_ORDER, max((len(weights) for weights in rule.weights.values()), default=1) - 1)
        return replace(rule, steps=letters, predictor="taylor", order=order, weights={})

    guided = [step for step, s in enumerate(sources) if not s or any(i < collapsed for i in s)]
    start = guided[-1] + 1  # the first step is among them
    rules = tuple(mapped(rule) for rule in plan.rules)
    return Plan(len(new), rules, start if start < len(new) else None)


def macs_fraction(anatomy: Anatomy, table: Mapping[str, str]) -> float:
    """Return the share of the model's multiply-accumulates that a table of letters computes.

    Reused sites save their own; a skipped block saves all of it, modulation layers included.
    """
    steps = len(next(iter(table.values())))
    if not anatomy.macs:
        return math.nan
    saved = 0
    for block in anatomy.blocks:
        letters = {site.branch: table[block.key(site)] for site in block.sites}
        for step in range(steps):
            if any(row[step] == "S" for row in letters.values()):
                saved += block.macs
            else:
                saved += sum(site.macs for site in block.sites if letters[site.branch][step] == "R")
    return 1 - saved / (anatomy.macs * steps)


def dump(content: Any, indent: str = "") -> str:
    """Write JSON with a line for each list of plain values, so that a person can read and compare it."""
    inner = indent + "  "
    if isinstance(content, Mapping) and content:
        items = [f"{inner}{json.dumps(str(key))}: {dump(value, inner)}" for key, value in content.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(content, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in content):
        return "[\n" + ",\n".join(inner + dump(item, inner) for item in content) + f"\n{indent}]"
    return json.dumps(content, allow_nan=False, ensure_ascii=False)
