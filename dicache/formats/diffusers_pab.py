"""diffusers' PyramidAttentionBroadcastConfig, as JSON with the class and its arguments but for the callback.

References:
    huggingface/diffusers 0.42.1, `hooks/pyramid_attention_broadcast.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.calibrate.methods import CalibrationError
from dicache.calibrate.pab import Pab
from dicache.formats.diffusers_files import arguments, written
from dicache.formats.files import number, whole
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.formats.steps import note_branches, planned
from dicache.schedules import Schedule

CLASS = "PyramidAttentionBroadcastConfig"
KINDS = ("spatial", "temporal", "cross")
WINDOW = (100, 800)  # by default


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    if schedule.method != "pab":
        raise FormatError(f"needed a schedule of `dicache calibrate pab`, found one of {schedule.method}")
    plan, settings = planned(schedule, ""), schedule.settings
    made = Pab(dict(settings["ranges"]), tuple(settings["window"]))
    if made.plan(schedule.anatomy, schedule.steps, schedule.target.timesteps) != plan:
        raise FormatError(
            "the plan is no longer what its ranges and window give; was the schedule mapped to other steps?"
        )
    note_branches(schedule, losses)
    ranges = {_kind_of(branch, losses): length for branch, length in made.ranges.items()}
    kwargs: dict[str, Any] = {f"{kind}_attention_block_skip_range": ranges.get(kind) for kind in KINDS}
    kwargs |= {f"{kind}_attention_timestep_skip_range": list(made.window) for kind in KINDS}
    return written(CLASS, kwargs)


def _kind_of(branch: str, losses: Losses) -> str:
    """Return what diffusers calls a kind of attention."""
    path, _, kind = branch.rpartition(".")
    if kind == "cross_attn":
        return "cross"
    if kind in ("attn", "joint_attn"):
        return "temporal" if "temporal" in path else "spatial"
    losses.beyond.append(f"{branch} would be computed at every step: diffusers broadcasts attention only")
    return branch


def read(path: Path, given: Given) -> Read:
    names = [f"{kind}_attention_{what}_skip_range" for what in ("block", "timestep") for kind in KINDS]
    settings = arguments(path, CLASS, names)
    ranges = {kind: settings.get(f"{kind}_attention_block_skip_range") for kind in KINDS}
    wanted = {kind: whole(f"{path}: the range of {kind}", n, least=1) for kind, n in ranges.items() if n is not None}
    if not wanted:
        wanted = {"spatial": 2}  # what diffusers takes then
    windows = {kind: tuple(settings.get(f"{kind}_attention_timestep_skip_range", WINDOW)) for kind in wanted}
    if len(set(windows.values())) > 1:
        raise FormatError(f"{path}: dicache has one window of timesteps for all kinds of attention, found {windows}")
    window = next(iter(windows.values()))
    if len(window) != 2:
        raise FormatError(f"{path}: a window is a lowest and a highest timestep, found {window}")
    paths = {block.path for block in given.anatomy.blocks}
    temporal = next((path for path in paths if "temporal" in path), "")
    branches = {"spatial": "attn", "cross": "cross_attn", "temporal": f"{temporal}.attn"}
    if "temporal" in wanted and not temporal:
        raise FormatError(f"{path} is for a model with temporal blocks, and {given.anatomy.model} has none")
    low, high = (number(f"{path}: the window", value) for value in window)
    try:
        made = Pab({branches[kind]: length for kind, length in wanted.items()}, (low, high))
        plan = made.plan(given.anatomy, given.steps, given.target.timesteps)
    except CalibrationError as error:
        raise FormatError(f"{path}: {error}") from None
    return Read("pab", {"ranges": made.ranges, "window": list(made.window)}, plan=plan)


FORMAT = Format(
    name="diffusers-pab",
    engine="diffusers 0.42.1",
    source="huggingface/diffusers: hooks/pyramid_attention_broadcast.py",
    suffix=".json",
    holds="schedules of `dicache calibrate pab` for attention",
    loses="MLPs; the callback that tells the timestep",
    use=(
        "import diffusers, json; made = json.load(open('FILE'))",
        "now = lambda: pipe.current_timestep",
        "config = diffusers.PyramidAttentionBroadcastConfig(**made['kwargs'], current_timestep_callback=now)",
        "diffusers.apply_pyramid_attention_broadcast(pipe.transformer, config)",
        "A pipeline that has no current_timestep needs another callback, such as one that a hook on its model tells.",
        "Use it with both guidance passes in one batch: where they are separate calls, one state serves both, and the",
        "second takes the attention of the first. On a model without enable_cache reset the hooks before each image.",
    ),
    export=export,
    read=read,
)
