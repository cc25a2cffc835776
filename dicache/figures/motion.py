"""How much videos move, and what AdaCache makes of it."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from dicache.calibrate.simulating import decisions
from dicache.figures.heatmap import describe
from dicache.figures.page import SMALL, label, new_page, whole_numbers
from dicache.figures.palette import COLOURS, GRID, INK, method_colour
from dicache.profiler import Profile, ProfileError
from dicache.schedules import AdaCachePolicy, Schedule

MARKERS = "osD^"


def motion_rates(profile: Profile, schedules: Sequence[tuple[str, Schedule]]) -> Figure:
    """Draw the motion of each run of a video model, and how many steps schedules of AdaCache compute of it.

    Left, how much the decision block's residual differs from frame to frame, 0 to 1, a line a run: the mean over
    guidance passes. Right, what each schedule would have computed on the profile's runs, against the run's mean motion.

    Args:
        profile: Of a video model.
        schedules: Names and schedules, at most four, of AdaCache; by the first's decision block and residual motion is
            drawn.

    Raises:
        ValueError: If there is no schedule, are too many, or one is of another method.
        ProfileError: If the profile has no frames, or no finished run.

    References:
        AdaCache, arXiv 2411.02397, section 3.3 and figure 5.
    """
    policies = [schedule.policy for _, schedule in schedules]
    if not 1 <= len(policies) <= len(MARKERS) or not all(isinstance(policy, AdaCachePolicy) for policy in policies):
        raise ValueError(f"needed 1 to {len(MARKERS)} schedules of adacache; found {len(policies)} of any method")
    measured = describe(profile)
    first = policies[0]
    assert isinstance(first, AdaCachePolicy)
    found = profile.between_frames(first.decision_blocks[-1], first.branch)
    if found is None:
        raise ProfileError(f"{profile.provenance.model} makes single pictures, without motion; profile a video model")
    along = found.mean(axis=1)  # (r, s)
    each = along.mean(axis=1)
    figure = new_page(
        10.0, 4.0, "How much each video moves, and how many steps it gets", f"{measured}. Yellow: the most lively run."
    )
    steps, runs = figure.subplots(1, 2)
    ranks = np.argsort(np.argsort(each)) / max(1, len(each) - 1)
    for row, rank in zip(along, ranks, strict=True):
        steps.plot(row, color=colormaps[COLOURS](rank), linewidth=1.6)
    label(steps, x="step (0 = noisiest)", y="change from frame to frame (0 to 1)")
    steps.set_xlim(0, profile.steps - 1)
    steps.set_ylim(bottom=0)
    whole_numbers(steps, x=9)
    for (name, schedule), policy, marker in zip(schedules, policies, MARKERS, strict=False):
        assert policy is not None
        computed = decisions(policy, profile).sum(axis=-1).mean(axis=1)  # (r,)
        color = method_colour(schedule.method) or INK
        face = color if marker == MARKERS[0] else "none"
        runs.scatter(each, computed, s=44, marker=marker, facecolors=face, edgecolors=color, linewidths=1.4, label=name)
    label(runs, x="mean change from frame to frame (0 to 1)", y=f"steps computed, of {profile.steps}")
    whole_numbers(runs, y=9)
    for axes in (steps, runs):
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    runs.legend(fontsize=SMALL, labelcolor=INK, framealpha=0.9, edgecolor="none")
    return figure
