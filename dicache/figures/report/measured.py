"""What was measured: where the profile comes from, and what repeats from step to step."""

from collections.abc import Mapping
from itertools import combinations_with_replacement
from pathlib import PurePath
from typing import Any

import numpy as np

from dicache.figures.heatmap import NARROWEST, Table, colour_scale, mean_over_runs
from dicache.figures.report.maps import Axis, Colours, blocks_axis, heat_map, steps_axis
from dicache.figures.report.markup import Markup, element
from dicache.figures.report.plots import Section, folded, section, table
from dicache.profiler import Profile

LARGEST_ERROR = 1.0  # above it reuse is worse than leaving the change out altogether


def model_name(profile: Profile) -> str:
    """Return how the model is called: of a folder, its name."""
    model = profile.provenance.model
    return PurePath(model).name if PurePath(model).is_absolute() else model


def provenance(profile: Profile, file: str) -> Section:
    """Return where the profile comes from, and its runs."""
    origin, target = profile.provenance, profile.provenance.target
    done = sum(run.ok for run in profile.runs)
    size = " x ".join(str(origin.settings[side]) for side in ("height", "width") if origin.settings.get(side))
    anatomy = profile.anatomy
    facts: Mapping[str, Any] = {
        "profile": file,
        "model": origin.model,
        "class": anatomy.model,
        "weights": target.weights,
        "precision": target.dtype,
        "blocks": f"{len(anatomy.blocks)}, with {', '.join(profile.branches)}",
        "sampler": target.scheduler,
        "steps": f"{profile.steps} ({target.num_inference_steps} inference steps)",
        "guidance": f"{origin.settings.get('guidance')}, {len(origin.contexts)} call"
        f"{'s' * (len(origin.contexts) > 1)} of the model a step",
        "size": f"{size or 'usual'}, latents {' x '.join(map(str, target.latents or ()))}",
        "runs": f"{done} finished" + (f", {len(profile.runs) - done} failed" if done < len(profile.runs) else ""),
        "made with": ", ".join(f"{name} {version}" for name, version in origin.versions.items()),
    }
    known = {name: value for name, value in facts.items() if value is not None}
    listed = element(
        "dl", (element("div", element("dt", name), element("dd", str(value))) for name, value in known.items())
    )
    runs = [(str(i), (run.prompt, str(run.seed), run.status)) for i, run in enumerate(profile.runs)]
    told = folded("Its runs", table(["run", "prompt", "seed", "status"], runs, caption="Runs of the profile"))
    return section("provenance", "What was measured", listed, told)


def similarity(profile: Profile) -> Section:
    """Return maps of how much each branch's output is like that of earlier steps, all lags on one colour scale."""
    tables = {
        lag: {branch: mean_over_runs(profile.similarity(branch, lag)) for branch in profile.branches}
        for lag in range(1, min(profile.provenance.lags, profile.steps - 1) + 1)
    }
    scale = colour_scale([values for of_lag in tables.values() for values in of_lag.values()])
    colours = Colours(scale.low, 1, "high", "cosine")
    parts = []
    for lag, of_lag in tables.items():
        before = "the step before" if lag == 1 else f"{lag} steps before"
        maps = element("div", (_of_branch(b, lag, before, t, colours) for b, t in of_lag.items()), class_="maps")
        parts.append(maps if lag == 1 else folded(f"The same against {before}", maps))
    told = element(
        "p",
        "The brighter a cell, the more the output of a branch (attention, MLP) at this step is like the one of an "
        "earlier step, and the less is lost by holding that. Means over runs and guidance passes.",
    )
    return section("similarity", "Which branches repeat themselves", told, colours.legend(), *parts)


def _of_branch(branch: str, lag: int, before: str, values: Table, colours: Colours) -> Markup:
    blocks, steps = values.shape
    title = f"{branch}: likeness of its output to {before}"
    return heat_map(
        f"similarity-{branch}-{lag}",
        title,
        values,
        blocks_axis(blocks),
        steps_axis(steps),
        colours,
        _mean(values),
        explained=False,
    )


def blocks(profile: Profile) -> Section:
    """Return maps of the blocks' deltas, of block ranges, and of the whole body between any two steps."""
    delta = mean_over_runs(profile.delta_cosine)
    colours = Colours(colour_scale([delta]).low, 1, "high", "cosine")
    count, steps = delta.shape
    title = "Likeness of each block's delta to the step before"
    of_blocks = heat_map("delta", title, delta, blocks_axis(count), steps_axis(steps), colours, _mean(delta))
    told = element(
        "p",
        "A delta is what blocks add to their input. Where it repeats, whole blocks can be skipped and the last delta "
        "added in their place.",
    )
    ranges = range_errors(profile)
    of_ranges = heat_map(
        "ranges",
        "Error of holding the delta of a block range for one step",
        ranges,
        Axis("first block", blocks_axis(count).names, "first block"),
        Axis("last block", blocks_axis(count).names, "last block"),
        _errors(ranges),
        "Mean over runs, passes and steps of |delta - delta of the step before| / |delta|.",
    )
    maps = [of_blocks, of_ranges]
    if "body/gram" in profile.arrays:
        held = held_errors(profile)
        of_steps = heat_map(
            "held",
            "Error of holding what all blocks add, from one step to a later one",
            held,
            Axis("computed at step", steps_axis(steps).names, "computed at step"),
            Axis("held at step", steps_axis(steps).names, "held at step"),
            _errors(held),
            "Mean over runs of |guided residual - the held one| / |guided residual|; 1 and above look alike.",
        )
        maps.append(of_steps)
    return section(
        "blocks",
        "Which blocks repeat themselves",
        told,
        element("div", maps, class_="maps"),
    )


def range_errors(profile: Profile) -> Table:
    """Return the relative error of each range of blocks that takes the delta of the step before, (first, last).

    The mean of `Profile.range_error` over runs, passes and steps; masked where no one delta can stand for the range.
    """
    count = len(profile.anatomy.blocks)
    gram = profile.arrays["delta/gram"]  # (r, c, s, 2b, 2b)
    errors = np.full((count, count), np.nan)
    for start, stop in profile.anatomy.segments:
        now, before = slice(start, stop), slice(count + start, count + stop)
        cross = gram[..., now, before]
        size = _sums(gram[..., now, now])
        change = _sums(gram[..., now, now] + gram[..., before, before] - cross - np.swapaxes(cross, -1, -2))
        for first, last in combinations_with_replacement(range(stop - start), 2):
            with np.errstate(invalid="ignore", divide="ignore"):
                squared = _square(change, first, last + 1) / _square(size, first, last + 1)  # (r, c, s)
            error: Table = np.ma.masked_invalid(np.sqrt(np.maximum(squared, 0)))
            errors[start + first, start + last] = np.ma.filled(error.mean(), np.nan)
    return np.ma.masked_invalid(errors)


def _sums(products: np.ndarray) -> np.ndarray:
    """Return the sums of the first rows and columns, of none to all: (..., n, n) -> (..., n + 1, n + 1)."""
    return np.pad(products.cumsum(-1).cumsum(-2), [(0, 0)] * (products.ndim - 2) + [(1, 0), (1, 0)])


def _square(sums: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return the sum over the rows and columns from `start` to `stop`."""
    both, none = sums[..., stop, stop], sums[..., start, start]
    return np.asarray(both - sums[..., start, stop] - sums[..., stop, start] + none)


def held_errors(profile: Profile) -> Table:
    """Return the relative error of the guided body residual that is held from one step to a later one.

    Shape (steps, steps), computed and held; the mean over runs, masked where a step does not come after the other.
    """
    gram = profile.arrays["body/gram"]  # (r, s, s)
    size = np.diagonal(gram, axis1=1, axis2=2)  # (r, s)
    with np.errstate(invalid="ignore", divide="ignore"):
        squared = (size[:, :, None] + size[:, None, :] - 2 * gram) / size[:, None, :]
    errors: Table = np.ma.masked_invalid(np.sqrt(np.maximum(squared, 0))).mean(axis=0)
    errors[np.tril_indices(len(errors))] = np.ma.masked
    return errors


def _errors(values: Table) -> Colours:
    return Colours(0, float(np.clip(values.max(), NARROWEST, LARGEST_ERROR)), "low", "relative error")


def _mean(values: Table) -> str:
    return f"Mean {values.mean():.3f}, lowest {values.min():.3f}."
