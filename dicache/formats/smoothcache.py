"""SmoothCache's JSON: a list of 0 and 1 for each component, or for a component of one block.

References:
    Roblox/SmoothCache, PyPI dit-smoothcache 0.1.1, `smooth_cache_helper.py`: `attn1` is the attribute of a block, and
    `attn1-3` that of the block at place 3 of its list, which goes before. 1 computes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.anatomy.parts import Block, Site
from dicache.calibrate.l2c import rules_of
from dicache.formats.files import as_json, mask, read_json
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.formats.steps import note_branches, planned, stand_ins
from dicache.schedules import Plan, Schedule
from dicache.schedules.plan import ACT, COMPUTE, HOLD

NAMES = ("diffusers", "branches")  # of components: the modules' own, or what dicache and facebookresearch/DiT call them


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    plan = planned(schedule, "")
    names = values.get("names", "diffusers")
    if names not in NAMES:
        raise FormatError(f"names is one of {' and '.join(NAMES)}, found {names!r}")
    table = plan.table(schedule.anatomy)
    if "S" in "".join(table.values()):
        raise FormatError(
            "SmoothCache knows branches, and this plan skips whole blocks; export it to cache-dit or mask"
        )
    note_branches(schedule, losses)
    if stand_ins(schedule) - {HOLD}:
        losses.beyond.append("the last output would be held where the plan foretells it")
    components: dict[str, dict[str, str]] = {}
    for block in schedule.anatomy.blocks:
        for site in block.sites:
            row, name = table[block.key(site)], _name(block, site, names)
            known = components.setdefault(name, {}).setdefault(str(block.position), row)
            if known != row:
                raise FormatError(
                    f"SmoothCache tells blocks by their place in a list, and {name} at place {block.position} is "
                    "computed at other steps in another list of blocks"
                )
    written: dict[str, list[int]] = {}
    for name, rows in components.items():
        if "R" not in "".join(rows.values()):
            continue
        if len(set(rows.values())) == 1:
            written[name] = _numbers(next(iter(rows.values())))
        else:
            written |= {f"{name}-{place}": _numbers(row) for place, row in rows.items()}
    if not written:
        raise FormatError("this plan computes everything; there is nothing to write")
    return as_json(written)


def _name(block: Block, site: Site, names: str) -> str:
    if names == "branches":
        return site.branch
    if "." in site.module:
        raise FormatError(f"SmoothCache wraps attributes of a block, and {block.module}.{site.module} lies deeper")
    return site.module


def _numbers(row: str) -> list[int]:
    return [int(letter == COMPUTE) for letter in row]


def read(path: Path, given: Given) -> Read:
    content = read_json(path)
    if not isinstance(content, Mapping) or not content:
        raise FormatError(f"{path} must be an object with a list for each component, such as attn1")
    letters = {key: mask(f"{path}: {key}", row, given.steps) for key, row in content.items()}
    rows: dict[str, str] = {}
    used: set[str] = set()
    for block in given.anatomy.blocks:
        for site in block.sites:
            names = [f"{name}{place}" for place in (f"-{block.position}", "") for name in (site.module, site.branch)]
            found = [name for name in names if name in letters]
            used.update(found)
            rows[block.key(site)] = letters[found[0]] if found else COMPUTE * given.steps
    if unknown := sorted(letters.keys() - used):
        known = dict.fromkeys(name for b in given.anatomy.blocks for s in b.sites for name in (s.module, s.branch))
        raise FormatError(f"{path}: {given.anatomy.model} has no {unknown[0]}; it has {', '.join(known)}")
    plan = Plan(given.steps, rules_of(rows, given.anatomy)) if ACT in "".join(rows.values()) else Plan(given.steps)
    return Read("smoothcache", {"components": list(content)}, plan=plan)


FORMAT = Format(
    name="smoothcache",
    engine="dit-smoothcache 0.1.1",
    source="Roblox/SmoothCache: SmoothCache/smooth_cache_helper.py",
    suffix=".json",
    holds="any steps of any branches, held",
    loses="what foretells instead of holding; guidance passes share one mask",
    use=(
        "import json, SmoothCache; from diffusers.models.attention import BasicTransformerBlock as Block",
        "cache = SmoothCache.SmoothCacheHelper(pipe.transformer, Block, ['attn1', 'ff'], json.load(open('FILE')))",
        "cache.enable(); pipe(...); cache.disable()",
        "Call enable before and disable after each generation: its counters go on, and behind the list it computes",
        "everything. They count calls, so that both guidance passes must be in one batch. Its DiffuserCacheHelper",
        "wraps attn1 alone. It prints a line a call.",
    ),
    export=export,
    read=read,
)
