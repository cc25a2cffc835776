"""What schedules mean to compute: a strip each, steps along it and blocks down it."""

import math
from collections.abc import Iterator, Mapping, Sequence

from dicache.figures.report.maps import Axis, kinds_legend, strip
from dicache.figures.report.markup import Markup, element
from dicache.figures.report.plots import Section, section
from dicache.figures.schedule import share_in_words
from dicache.schedules import Schedule
from dicache.schedules.drawing import alike


def schedules(named: Sequence[tuple[str, Schedule]]) -> Section:
    """Return what each schedule computes, reuses and skips; of one that decides at run time, what is expected."""
    told = element("p", "From left to right the steps, from top to bottom the blocks as they are called.")
    strips = [strip for place, (name, schedule) in enumerate(named) for strip in _strips(place, name, schedule)]
    return section("schedules", "What is computed at each step", told, kinds_legend(), *strips)


def _strips(place: int, name: str, schedule: Schedule) -> Iterator[Markup]:
    settings = ", ".join(f"{key} {value}" for key, value in schedule.settings.items() if value not in (None, (), []))
    note = f"{schedule.method}: {settings}" if settings else schedule.method
    if not schedule.foreseen:
        yield element("p", element("strong", name), f" ({note}): {share_in_words(schedule)}.", class_="missing")
        return
    for number, context in enumerate((*schedule.contexts, None)):
        which = "" if not schedule.contexts else f", {'any other pass' if context is None else f'pass {context}'}"
        share = share_in_words(schedule) if context is None else _share(schedule.macs_fraction(context))
        rows, letters = _rows(schedule, schedule.table(context))
        yield strip(f"strip-{place}-{number}", f"{name}{which}: {share}", rows, letters, note)


def _share(fraction: float) -> str:
    return "MACs not known" if math.isnan(fraction) else f"{100 * fraction:.0f} % of the MACs"


def _rows(schedule: Schedule, letters: Mapping[str, str]) -> tuple[Axis, list[str]]:
    """Return a row a block or, where the branches of a block are treated differently, a row for branches alike."""
    blocks = [[block.key(site) for site in block.sites] for block in schedule.anatomy.blocks]
    if all(len({letters[key] for key in keys}) == 1 for keys in blocks):
        names = [str(block.index) for block in schedule.anatomy.blocks]
        return Axis("block", names, "block"), [letters[keys[0]] for keys in blocks]
    lines = alike(letters)
    return Axis("", [name for name, _ in lines], ""), [row for _, row in lines]
