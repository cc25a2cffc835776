"""Corrections of held outputs: tensors in a safetensors file beside the schedule's JSON."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from dicache.anatomy.memory import host_memory
from dicache.anatomy.parts import Anatomy
from dicache.schedules.plan import ACT, COMPUTE, HOLD, REUSED, Plan, PlanError

Form = Literal["multiply", "add"]
KEYS: Mapping[str, Any] = {
    "form": str,
    "weight": (int, float),
    "contexts": Mapping,
    "sites": Mapping,
    "file": str,
    "sha256": str,
}


@dataclass(frozen=True, eq=False)
class Corrections:
    """What a held output C is corrected by, with a trend T: `C * (1 + weight * T)`, or `C + weight * T`.

    Attributes:
        form: `multiply` or `add`.
        weight: Of the trend.
        contexts: Of each guidance pass that is corrected, how many parts its batch has: 2 where it holds the guided
            and the unguided half, which each have a trend of their own, else 1.
        sites: The sites that are corrected, with a letter a step: `.` where they are, `C` where they are left alone.
        tensors: The trends, `<context>/<site>/<step>`: (parts, tokens, channels). Of a site that gives several
            tensors, their tokens in a row.
        file: Name of the file that they were read from, empty if they were not.

    References:
        EOC, arXiv 2501.19243, equation 7.
    """

    form: Form
    weight: float
    contexts: Mapping[str, int]
    sites: Mapping[str, str]
    tensors: Mapping[str, np.ndarray] = field(repr=False)
    file: str = ""

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise PlanError(f"corrections: unknown form {self.form!r}; it is multiply or add")
        if not math.isfinite(self.weight):
            raise PlanError(f"corrections: the weight must be a finite number, found {self.weight}")
        if any(type(parts) is not int or parts < 1 for parts in self.contexts.values()):
            raise PlanError(f"corrections: a guidance pass has 1 part or more, found {dict(self.contexts)}")
        for site, letters in self.sites.items():
            if not isinstance(letters, str) or set(letters) - {COMPUTE, ACT}:
                raise PlanError(f"corrections: {site} must have a letter C or . for each step, found {letters!r}")

    def check(self, plan: Plan, anatomy: Anatomy) -> None:
        """Raise PlanError unless the tensors are there for all that is corrected, and nothing else is."""
        wanted = set()
        for site, letters in self.sites.items():
            if site not in anatomy.sites:
                raise PlanError(f"corrections: {anatomy.model} has no site {site}")
            if len(letters) != plan.steps:
                raise PlanError(f"corrections: {site} has {len(letters)} letters for a plan of {plan.steps} steps")
        for context in self.contexts:
            table, stand_ins = plan.table(anatomy, context), plan.stand_ins(anatomy, context)
            for site, letters in self.sites.items():
                for step, (letter, planned) in enumerate(zip(letters, table[site], strict=True)):
                    if letter == COMPUTE:
                        continue
                    if planned != REUSED or stand_ins[site][step] != HOLD:
                        raise PlanError(
                            f"corrections: {site} is corrected at step {step}, where the plan does not hold it"
                        )
                    wanted.add(name_of(context, site, step))
        if wrong := sorted(wanted ^ self.tensors.keys()):
            kind = "has no" if wrong[0] in wanted else "has an unknown"
            raise PlanError(f"corrections: {self.file or 'what was given'} {kind} tensor {wrong[0]}")
        for name, tensor in self.tensors.items():
            if tensor.ndim != 3 or len(tensor) != self.contexts[name.rsplit("/", 2)[0]]:
                raise PlanError(f"corrections: {name} must be (parts, tokens, channels), found {tensor.shape}")
            if not np.isfinite(tensor).all():
                raise PlanError(f"corrections: {name} has numbers that are not finite")

    @cached_property
    def sha256(self) -> str:
        """Of the file that the tensors are written to."""
        return hashlib.sha256(self._written()).hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether the other corrects the same in the same way, whatever file it comes from."""
        if not isinstance(other, Corrections):
            return NotImplemented
        return {**self.to_json(), "file": ""} == {**other.to_json(), "file": ""}

    def to_json(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "weight": self.weight,
            "contexts": dict(self.contexts),
            "sites": dict(self.sites),
            "file": self.file,
            "sha256": self.sha256,
        }

    def write(self, path: Path) -> None:
        """Write the tensors."""
        path.write_bytes(self._written())

    def _written(self) -> bytes:
        written: bytes = safetensors.numpy.save({n: np.ascontiguousarray(x) for n, x in sorted(self.tensors.items())})
        return written

    @classmethod
    def from_json(cls, content: Any, folder: Path | None) -> "Corrections":
        """Read what a schedule says of its corrections, and their tensors from the file beside it.

        Raises:
            PlanError: If a key is unknown or missing, or the file is missing or another than the schedule was saved
                with.
        """
        if not isinstance(content, Mapping) or content.keys() != KEYS.keys():
            raise PlanError(f"corrections: needed an object with the keys {', '.join(KEYS)}, found {content!r}")
        for key, value in content.items():
            if not isinstance(value, KEYS[key]) or isinstance(value, bool):
                raise PlanError(f"corrections: {key} cannot be {value!r}")
        name = content["file"]
        if name in ("", "..") or Path(name).name != name or "\\" in name:
            raise PlanError(f"corrections: the file must lie beside the schedule, found {name!r}")
        if folder is None:
            raise PlanError(f"corrections: their tensors lie in {name} beside the schedule's file; read that")
        beside = folder / name
        if beside.exists() and not beside.is_file():
            raise PlanError(f"corrections: {name} is not a file")
        try:
            size = beside.stat().st_size
            if 2 * size > (free := host_memory()):
                raise PlanError(f"corrections: {name} takes {2 * size:.3g} bytes of memory, and {free:.3g} are free")
            data = beside.read_bytes()
        except FileNotFoundError:
            raise PlanError(
                f"corrections: {name} is missing beside the schedule; the two files belong together, copy both"
            ) from None
        if hashlib.sha256(data).hexdigest() != content["sha256"]:
            raise PlanError(
                f"corrections: {name} is not the file that this schedule was saved with (its checksum differs); "
                "copy both files again, or calibrate again"
            )
        try:
            tensors = safetensors.numpy.load(data)
        except SafetensorError as error:
            raise PlanError(f"corrections: {name} is not a safetensors file ({error})") from None
        fields = {key: content[key] for key in ("form", "weight", "contexts", "sites", "file")}
        made = cls(**fields, tensors=tensors)
        vars(made)["sha256"] = content["sha256"]  # known, and not computed again
        return made


def name_of(context: str, site: str, step: int) -> str:
    """Return the name of a trend among the tensors."""
    return f"{context}/{site}/{step}"
