"""diffusers' TaylorSeerCacheConfig, as JSON with the class and its arguments.

References:
    huggingface/diffusers 0.42.1, `hooks/taylorseer_cache.py`: a step is computed if it is before
    `disable_cache_before_step` B, if (step - B - 1) is a multiple of `cache_interval`, or from
    `disable_cache_after_step` on.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from dicache.anatomy.parts import Anatomy
from dicache.calibrate.l2c import rules_of
from dicache.formats.diffusers_files import arguments, written
from dicache.formats.files import whole
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.formats.steps import note_branches, planned, stand_ins
from dicache.schedules import Plan, Rule, Schedule
from dicache.schedules.plan import ACT, COMPUTE

CLASS = "TaylorSeerCacheConfig"
DEFAULTS: Mapping[str, Any] = {
    "cache_interval": 5,
    "disable_cache_before_step": 3,
    "disable_cache_after_step": None,
    "max_order": 1,
    "taylor_factors_dtype": "bfloat16",
    "cache_identifiers": None,
}


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    plan = planned(schedule, "export it to diffusers-first-block,")
    table = plan.table(schedule.anatomy)
    if "S" in "".join(table.values()):
        raise FormatError(
            "diffusers' TaylorSeer foretells branches, and this plan skips whole blocks; export it to "
            "diffusers-magcache or cache-dit"
        )
    note_branches(schedule, losses)
    rows = {letters.replace("R", ACT) for letters in table.values()} - {COMPUTE * plan.steps}
    if not rows:
        raise FormatError("this plan computes everything; there is nothing to write")
    wanted = "".join(COMPUTE if any(row[i] == COMPUTE for row in rows) else ACT for i in range(plan.steps))
    if len(rows) > 1:
        losses.beyond.append("all branches would be foretold at the same steps, where the plan has some of their own")
    settings, letters = _nearest(wanted)
    if letters != wanted:
        steps = [str(i) for i in range(plan.steps) if letters[i] != wanted[i]]
        losses.beyond.append(f"step {', '.join(steps)} would be computed as well: the format has one interval")
    found = stand_ins(schedule)
    orders = {stand_in.order for stand_in in found if stand_in.predictor in ("hold", "taylor")}
    if {stand_in.predictor for stand_in in found} & {"forecast", "feature"} or len(orders) > 1:
        losses.beyond.append("a Taylor expansion would stand in where the plan has a forecast, or another order")
    acting = [key for key, letters in table.items() if ACT in letters.replace("R", ACT)]
    return written(
        CLASS,
        {
            **settings,
            "max_order": max(orders, default=1),
            "taylor_factors_dtype": schedule.target.dtype or "float32",
            "cache_identifiers": _identifiers(schedule.anatomy, acting),
        },
    )


def _nearest(wanted: str) -> tuple[dict[str, Any], str]:
    """Return the arguments that compute all that is wanted and as little else as they can, and what they compute."""
    steps = len(wanted)
    computed = [step for step, letter in enumerate(wanted) if letter == COMPUTE]
    gaps = {later - earlier for earlier, later in pairwise(computed)} | {1, steps + 1}
    best: tuple[int, dict[str, Any], str] | None = None
    for before in range(1, steps + 1):
        for interval in sorted(gaps, reverse=True):
            found = _letters(before, interval, None, steps)
            missing = [i for i in computed if found[i] == ACT]
            after = missing[0] if missing else None
            found = _letters(before, interval, after, steps)
            extra = found.count(COMPUTE) - len(computed)
            if best is None or extra < best[0]:
                settings = {"cache_interval": interval, "disable_cache_before_step": before}
                best = extra, {**settings, "disable_cache_after_step": after}, found
    assert best is not None
    return best[1:]


def _letters(before: int, interval: int, after: int | None, steps: int) -> str:
    """Return what the hook computes at each step."""

    def computes(step: int) -> bool:
        return step < before or (step - before - 1) % interval == 0 or (after is not None and step >= after)

    return "".join(COMPUTE if computes(step) else ACT for step in range(steps))


def _identifiers(anatomy: Anatomy, keys: list[str]) -> list[str]:
    """Return the patterns that match the modules of some sites; those of all blocks of a list share one."""
    wanted = set(keys)
    places: dict[tuple[str, str], list[int]] = {}
    for block in anatomy.blocks:
        for site in block.sites:
            for module in site.modules if block.key(site) in wanted else ():
                places.setdefault((block.path, module), []).append(block.position)
    counts = {path: sum(block.path == path for block in anatomy.blocks) for path, _ in places}

    def pattern(path: str, module: str, positions: list[int]) -> str:
        which = r"\d+" if len(positions) == counts[path] else f"(?:{'|'.join(map(str, positions))})"
        return rf"{re.escape(path)}\.{which}\.{re.escape(module)}"

    return [pattern(path, module, positions) for (path, module), positions in places.items()]


def read(path: Path, given: Given) -> Read:
    settings = {**DEFAULTS, **arguments(path, CLASS, DEFAULTS)}
    interval = whole(f"{path}: cache_interval", settings["cache_interval"], least=1)
    before = whole(f"{path}: disable_cache_before_step", settings["disable_cache_before_step"], least=0)
    after = settings["disable_cache_after_step"]
    if after is not None:
        after = whole(f"{path}: disable_cache_after_step", after, least=0)
    order = whole(f"{path}: max_order", settings["max_order"], least=0)
    if not before and interval > 1 and after != 0:
        raise FormatError(f"{path}: computes no first step: disable_cache_before_step must be 1 or more")
    letters = _letters(before, interval, after, given.steps)
    keys = list(_matching(path, settings["cache_identifiers"], given.anatomy))
    rows = {key: letters if key in keys else COMPUTE * given.steps for key in given.anatomy.sites}
    rules = [
        {**vars(rule), "predictor": "taylor" if order else "hold", "order": order}
        for rule in rules_of(rows, given.anatomy)
    ]
    return Read("taylorseer", settings, plan=Plan(given.steps, tuple(Rule(**rule) for rule in rules)))


def _matching(path: Path, identifiers: Any, anatomy: Anatomy) -> Iterator[str]:
    """Yield the sites whose modules are foretold; what is matched besides, such as a module inside of one, is not told.

    Without patterns it is all whose names begin with one of diffusers' lists of blocks and contain `attn`.
    """
    if identifiers is None:
        identifiers = [rf"{name}.*attn" for name in ("blocks", "transformer_blocks", "single_transformer_blocks")]
        identifiers.append(r"temporal_transformer_blocks.*attn")
    if not isinstance(identifiers, list) or not all(isinstance(each, str) for each in identifiers):
        raise FormatError(f"{path}: cache_identifiers must be a list of patterns, found {identifiers!r}")
    if costly := [each for each in identifiers if re.search(r"\)[*+?{]", each)]:
        raise FormatError(
            f"{path}: a group that repeats may take for ever to match, and no name needs it: {costly[0]!r}"
        )
    try:
        patterns = [re.compile(each) for each in identifiers]
    except re.error as error:
        raise FormatError(f"{path}: cache_identifiers holds no pattern ({error})") from None
    found = [
        block.key(site)
        for block in anatomy.blocks
        for site in block.sites
        if any(pattern.fullmatch(f"{block.module}.{site.module}") for pattern in patterns)
    ]
    if not found:
        raise FormatError(f"{path}: none of its cache_identifiers matches a branch of {anatomy.model}: {identifiers}")
    yield from found


FORMAT = Format(
    name="diffusers-taylorseer",
    engine="diffusers 0.42.1",
    source="huggingface/diffusers: hooks/taylorseer_cache.py",
    suffix=".json",
    holds="branches at a fixed interval after a warm-up, held or by a Taylor expansion of one order",
    loses="other steps",
    use=(
        "import diffusers, json, torch; made = json.load(open('FILE'))['kwargs']",
        "made['taylor_factors_dtype'] = getattr(torch, made['taylor_factors_dtype'])",
        "pipe.transformer.enable_cache(diffusers.TaylorSeerCacheConfig(**made))",
        "On a model without enable_cache: diffusers.hooks.apply_taylorseer_cache(model, config), call it inside of a",
        "cache context, and reset the hooks before each generation; its counter goes on from image to image.",
    ),
    export=export,
    read=read,
)
