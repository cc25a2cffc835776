"""The row files of SGLang's TeaCache calibration: of each step how many samples, and the means of two changes.

References:
    sgl-project/sglang, `multimodal_gen/runtime/cache/teacache_calibrate.py` (commit 2dcb5ab): `to_rows_dict`, and
    `merge_rows_dicts`, which adds files by their counts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dicache import __version__
from dicache.formats.files import check_keys, number, read_json, whole
from dicache.formats.format import FormatError, Given
from dicache.profiler import Profile, Provenance, Run
from dicache.profiler.storage import RunRecord, shapes

ONLY = "single"  # what it calls the model where a pipeline has one


def rows_of(profile: Profile, fit_to: str) -> dict[str, Any]:
    """Return the rows of a profile: every run and guidance pass is a sample.

    Args:
        profile: With the changes.
        fit_to: Whose change is the second: the model's `output`, as SGLang has it, or `body` or `residual`.

    Raises:
        FormatError: If it has no change at some step.
    """
    x, y = profile.relative_l1("input"), profile.relative_l1(fit_to)  # (runs, contexts, steps - 1)
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any(axis=(0, 1)).all():
        raise FormatError("the profile has steps at which no change was measured, and the form has a mean for each")
    rows = {"0": [int(x.shape[0] * x.shape[1]), 0.0, 0.0]}  # nothing comes before it, which counts as no change
    for step in range(1, profile.steps):
        here = known[:, :, step - 1]
        rows[str(step)] = [int(here.sum()), float(x[..., step - 1][here].mean()), float(y[..., step - 1][here].mean())]
    return {ONLY: rows}


def records_of(paths: Sequence[Path], given: Given, expert: str = ONLY) -> tuple[Provenance, list[RunRecord]]:
    """Return a profile whose runs are the means of row files, a run a file; all else in it is not a number.

    Args:
        paths: Of the files; a fit is judged on runs that it does not see, and needs two or more.
        given: The model, and its sampler with the timesteps.
        expert: Which of two models that share the steps.

    Raises:
        FormatError: If a file is not of this form, or of another number of steps.
    """
    provenance = Provenance(
        model=given.model,
        anatomy=given.anatomy,
        target=given.target,
        settings={"imported": "sglang-rows", "files": [path.name for path in paths]},
        versions={"dicache": __version__},
        lags=1,
        contexts=("mean",),
        parts=(1,),
    )
    records: list[RunRecord] = []
    for path in paths:
        arrays = {name: np.full(shape, np.nan) for name, shape in shapes(provenance).items()}
        rows = _rows(path, given.steps, expert)
        for step, (_, x, y) in rows.items():
            arrays["teacache/input"][0, step] = x, 1.0  # a change, and the size that it is relative to
            arrays["teacache/output"][0, step] = y, 1.0
        records.append(RunRecord(Run(f"mean of {rows[1][0]} samples in {path.name}", len(records)), arrays))
    return provenance, records


def _rows(path: Path, steps: int, expert: str) -> dict[int, tuple[int, float, float]]:
    content = read_json(path)
    if not isinstance(content, Mapping) or expert not in content:
        there = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise FormatError(f"{path} has no rows of {expert!r}, found {there}; choose one of these with --expert")
    rows = check_keys(f"{path}: {expert}", content[expert], [str(step) for step in range(steps)])
    if missing := [step for step in range(1, steps) if str(step) not in rows]:
        raise FormatError(f"{path} has no row for step {missing[0]} of {steps}; import with --steps of its own")
    found: dict[int, tuple[int, float, float]] = {}
    for step in range(1, steps):
        row = rows[str(step)]
        if not isinstance(row, list) or len(row) != 3:
            raise FormatError(f"{path}: the row of step {step} must be a count and two means, found {row!r}")
        what = f"{path}: step {step}"
        found[step] = (whole(what, row[0], least=1), number(what, row[1], least=0), number(what, row[2], least=0))
    return found
