"""What the spaces of all methods share; what a method's own space varies stands in the method's file."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, ClassVar

import numpy as np

from dicache.anatomy import Anatomy
from dicache.anatomy.parts import kind_of_branch
from dicache.calibrate.methods import Axis, Between, CalibrationError, name_of, planned_schedule
from dicache.profiler import Profile
from dicache.schedules import Schedule, Target

TRIES = 64  # values of a threshold, the first of which that suffices is what calibrating for a target begins with
LONGEST_INTERVAL = 16  # that a search tries; FORA's longest is 10, where the images are ruined
AROUND = (0.8, 1.2)  # shares of the MACs that are aimed at: a profile's runs foresee that of others to some hundredths


class MethodSpace(ABC):
    """What a search varies of a method, all but what is fixed.

    Attributes:
        settings: Where what is not varied comes from.
        fixed: Names of settings that are not varied.
        saving: Names of the axes along which less is computed, the one that is raised last first; with a minus before
            it, one that is lowered.
    """

    settings: Any
    fixed: Collection[str]
    steps: Any
    saving: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def free(self) -> Mapping[str, Axis]:
        """Return what may be varied."""

    @abstractmethod
    def made(self, settings: Any) -> Schedule:
        """Return the schedule that some settings give."""

    @property
    @abstractmethod
    def made_for(self) -> Any:
        """What decides the schedules besides the settings."""

    @cached_property
    def axes(self) -> Mapping[str, Axis]:
        return {name: axis for name, axis in self.free().items() if name not in self.fixed}

    @property
    def identity(self) -> Mapping[str, Any]:
        return {
            "method": name_of(type(self.settings)),
            "settings": {name: value for name, value in asdict(self.settings).items() if name not in self.axes},
            "made_for": self.made_for,
        }

    def usual(self) -> Mapping[str, Any]:
        """Return the parameters of the settings as they are, those on no axis too."""
        return asdict(self.settings)

    def plain(self, max_macs: float | None) -> Mapping[str, Any]:
        known = self.usual()
        parameters = {name: known[name] for name in self.axes}
        if max_macs is None:
            return parameters
        varied = [name for name in self.saving if name.removeprefix("-") in self.axes]
        names = [name.removeprefix("-") for name in varied]
        lists = [_values(self.axes[own], falling=own != name) for own, name in zip(names, varied, strict=True)]
        for values in product(*lists):
            chosen = dict(zip(names, values, strict=True))
            if self.share({**parameters, **chosen}) <= max_macs:
                return {**parameters, **chosen}
        raise CalibrationError(
            f"{name_of(type(self.settings))}: a share of {max_macs:.3f} of the MACs cannot be reached in {self.steps} "
            "steps, by the settings that are tried"
        )

    def share(self, parameters: Mapping[str, Any]) -> float:
        """Return the share of the multiply-accumulates to expect, above 1 where the parameters do not go together."""
        try:
            return self.schedule(parameters).macs_fraction()
        except CalibrationError:
            return 2.0

    def schedule(self, parameters: Mapping[str, Any]) -> Schedule:
        return self.made(self.with_parameters(parameters))

    def with_parameters(self, parameters: Mapping[str, Any]) -> Any:
        return replace(self.settings, **parameters)


def _values(axis: Axis, *, falling: bool) -> Sequence[Any]:
    values: list[Any] = list(axis) if not isinstance(axis, Between) else []
    if isinstance(axis, Between):
        spaced = np.geomspace if axis.log else np.linspace
        values = [axis.low, *spaced(axis.low, axis.high, TRIES)[1:-1].tolist(), axis.high]
    return values[::-1] if falling else values


@dataclass(frozen=True)
class PlanSpace(MethodSpace):
    """Of a method that makes a plan from its settings alone.

    Attributes:
        anatomy: The model's.
        target: What the schedules are bound to.
        steps: As the step clock counts them.
    """

    anatomy: Anatomy
    target: Target
    steps: int
    settings: Any
    fixed: Collection[str] = ()

    def made(self, settings: Any) -> Schedule:
        return planned_schedule(settings, self.anatomy, self.target, self.steps)

    @property
    def made_for(self) -> Any:
        return self.target.to_json()

    @property
    def intervals(self) -> range:
        return range(2, min(self.steps, LONGEST_INTERVAL + 1))

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of branch that the model has."""
        return tuple(dict.fromkeys(kind_of_branch(s.branch) for block in self.anatomy.blocks for s in block.sites))


@dataclass(frozen=True)
class ProfileSpace(MethodSpace):
    """Of a method that is calibrated on a profile.

    Attributes:
        profile: Where what is decided comes from.
    """

    profile: Profile
    settings: Any
    fixed: Collection[str] = ()

    @property
    def steps(self) -> int:
        return self.profile.steps

    def made(self, settings: Any) -> Schedule:
        schedule: Schedule = settings.calibrate(self.profile)
        return schedule

    @cached_property
    def made_for(self) -> Any:
        digest = hashlib.sha256()
        for name, array in sorted(self.profile.arrays.items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def thresholds(self, values: np.ndarray | Sequence[float]) -> Between:
        """Return the thresholds from the smallest to the largest of some positive values."""
        known = np.asarray(values)[np.isfinite(values) & (np.asarray(values) > 0)]
        if not len(known):
            raise CalibrationError(f"{name_of(type(self.settings))}: the profile measured no change; profile again")
        return Between(float(known.min()), float(known.max()) * 1.001, log=True)


@dataclass(frozen=True)
class AimedSpace(ProfileSpace):
    """Of a method whose threshold is found on the profile, for a speed-up.

    A threshold means something else for each of the other settings, so it is not drawn itself: the share of the
    multiply-accumulates is that it is to take on the profile's runs, `macs`, and the threshold is found for that.

    Attributes:
        max_macs: The share that is aimed at; others are drawn from around it. None draws from all that can be reached.
    """

    max_macs: float | None = None
    usual_speedup: ClassVar[float] = 1.8

    @property
    def least(self) -> float:
        """The least share of the multiply-accumulates that can be reached."""
        return 0.05

    def shares(self) -> Between:
        low, high = self.least, 1.0
        if self.max_macs is not None:
            low, high = max(low, AROUND[0] * self.max_macs), min(high, AROUND[1] * self.max_macs)
        if low >= high:
            raise CalibrationError(
                f"{name_of(type(self.settings))}: a share of {self.max_macs or 1:.3f} of the MACs cannot be reached in "
                f"{self.profile.steps} steps; the least is {self.least:.3f}"
            )
        return Between(low, high)

    def usual(self) -> Mapping[str, Any]:
        return {**super().usual(), "macs": 1 / (self.settings.target_speedup or self.usual_speedup)}

    def plain(self, max_macs: float | None) -> Mapping[str, Any]:
        plain = super().plain(None)
        return plain if max_macs is None or "macs" not in plain else {**plain, "macs": max_macs}

    def with_parameters(self, parameters: Mapping[str, Any]) -> Any:
        others = {name: value for name, value in parameters.items() if name != "macs"}
        if "macs" in parameters:
            others |= {"threshold": None, "target_speedup": 1 / parameters["macs"]}
        return replace(self.settings, **others)
