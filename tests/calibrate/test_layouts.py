"""Layouts: what lies next to a plan keeps to the budget, and differs from it in one thing."""

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dicache.anatomy import Anatomy
from dicache.anatomy.parts import Block, Site
from dicache.calibrate.forms import Form
from dicache.calibrate.layouts import Layout, Layouts
from dicache.calibrate.refining import first_difference
from dicache.calibrate.sensitivity import Forecasts, before, expansion
from dicache.schedules import Schedule, Target
from dicache.schedules.plan import Action
from tests.toys import written

STEPS, BLOCKS = 10, 6
PROFILE: Any = SimpleNamespace(
    anatomy=written(BLOCKS), provenance=SimpleNamespace(target=Target("Toy")), steps=STEPS, branches=("attn", "mlp")
)
BODY, BRANCHES = Form("body", "skip"), Form("branches", "reuse")


class Lines:
    """Foretells by expansions, and holds the steps near the middle to matter most."""

    name, trades, orders = "lines", (1.0,), True

    def kinds(self, action: Action) -> Sequence[str]:
        return ("body",) if action == "skip" else ("attn", "mlp")

    def best(self, action: Action, count: int, outputs: int, trade: float) -> tuple[int, ...]:
        return tuple(place * STEPS // count for place in range(count))

    def errors(self, action: Action, choices: Sequence[Collection[int]], outputs: int, trade: float) -> np.ndarray:
        return np.array([-sum(1 / (1 + abs(step - 5)) for step in chosen) for chosen in choices])

    def weights(self, kind: str, computed: Sequence[int], outputs: int, trade: float) -> Forecasts:
        return {s: expansion(before(computed, s, outputs), s) for s in range(STEPS) if s not in computed}


def share(layouts: Layouts, layout: Layout) -> float:
    return Schedule("auto", {}, PROFILE.anatomy, Target("Toy"), STEPS, layouts.plan(layout)).macs_fraction()


def first(layouts: Layouts, form: Form) -> Layout:
    layout = layouts.first(form, Lines(), 2, 1.0)
    assert layout is not None
    return layout


def test_the_first_layout_computes_what_the_share_allows_at_the_steps_that_are_foretold_best() -> None:
    layouts = Layouts(PROFILE, 0.55)
    (part,) = first(layouts, BODY).parts
    # Of 800 MACs a step, 600 are the blocks': (0.55 * 8000 - 2000) / 600 is exactly 4.
    assert (part.first, part.last, part.computed, part.kind) == (0, 5, (0, 2, 5, 7), "*")
    assert share(layouts, first(layouts, BODY)) == pytest.approx(0.55)
    assert Layouts(PROFILE, 1.0).first(BODY, Lines(), 2, 1.0) is None
    assert Layouts(PROFILE, 0.2).first(BODY, Lines(), 2, 1.0) is None


@pytest.mark.parametrize("form", [BODY, BRANCHES])
def test_what_lies_next_to_a_layout_keeps_to_the_share(form: Form) -> None:
    layouts = Layouts(PROFILE, 0.6)
    layout = first(layouts, form)
    plan = layouts.plan(layout)
    moves = list(layouts.moves(layout))
    names = [move.name for move in moves]
    assert len(set(names)) == len(names)
    assert {"1 outputs", "3 outputs"} <= set(names)
    for move in moves:
        other = layouts.plan(move.layout)
        assert other != plan or move.layout.trade != layout.trade  # these lines do not heed the trade
        assert share(layouts, move.layout) <= 0.6 + 1e-9
        blocks = [(p.first, p.last, p.kind) for p in move.layout.parts]
        assert len(set(blocks)) == len(blocks)


def test_what_is_left_of_the_share_is_spent_on_some_blocks_or_a_kind_of_branch() -> None:
    layouts = Layouts(PROFILE, 0.66)
    layout = first(layouts, BRANCHES)
    left = 0.66 * 8000 - share(layouts, layout) * 8000
    more = [move for move in layouts.moves(layout) if move.name.endswith("too")]
    front = int(left // 90)  # an attention and an MLP have 90 MACs
    assert 0 < front < BLOCKS
    told = {move.name.rpartition(" at step ")[0] for move in more}
    kinds = [kind for kind, macs in (("attn", 30), ("mlp", 60)) if BLOCKS * macs <= left]
    assert told == {f"blocks 0-{front - 1}", f"blocks {BLOCKS - front}-{BLOCKS - 1}", *kinds}
    steps = [int(move.name.split()[-2]) for move in more]
    assert len(steps) == 6 * len(told)
    steps = steps[:6]
    assert steps == sorted(steps, key=lambda step: abs(step - 5))  # those that matter most come first
    for move, step in zip(more, steps, strict=False):
        table = layouts.plan(move.layout).table(PROFILE.anatomy)
        base = layouts.plan(layout).table(PROFILE.anatomy)
        changed = {(key, i) for key in table for i in range(STEPS) if table[key][i] != base[key][i]}
        assert {place for _, place in changed} == {step}
        assert all(table[key][step] == "C" for key, _ in changed)


def test_another_step_is_computed_in_the_place_of_one_nearby() -> None:
    layouts = Layouts(PROFILE, 0.6)
    layout = first(layouts, BODY)
    for move in layouts.moves(layout):
        if " not " in move.name:
            old, new = set(layout.parts[0].computed), set(move.layout.parts[0].computed)
            ((gone,), (come,)) = old - new, new - old
            assert 0 not in (gone, come)
            assert abs(gone - come) <= 2
            assert first_difference(layouts.plan(layout), layouts.plan(move.layout), PROFILE.anatomy) == min(gone, come)


def test_kinds_of_branch_that_only_some_blocks_have_are_moved_there_alone() -> None:
    """As in SD3, whose last block has no MLP of the text, and in Flux, whose single blocks have one fused branch."""
    attn, mlp = Site("attn", "attn1", 30), Site("mlp", "ff", 60)
    text, fused = Site("mlp.context", "ff_context", 40), Site("fused", "proj_out", 90)
    sites = [(attn, mlp, text), (attn, mlp, text), (attn, mlp), (fused,), (fused,)]
    macs = [sum(site.macs for site in of) for of in sites]
    blocks = tuple(Block(i, "blocks", i, "Block", "hidden_states", sites[i], macs=macs[i]) for i in range(len(sites)))
    anatomy = Anatomy("Toy", blocks, ((0, 3), (3, 5)), sum(macs) + 200, latents=(4, 8, 8))
    kinds = ("attn", "mlp", "mlp.context", "fused")
    profile = SimpleNamespace(anatomy=anatomy, provenance=PROFILE.provenance, steps=STEPS, branches=kinds)
    for form in (BODY, BRANCHES):
        layouts = Layouts(profile, 0.65)  # type: ignore[arg-type]
        source = Lines()
        source.kinds = lambda action: ("body",) if action == "skip" else kinds  # type: ignore[method-assign]
        layout = layouts.first(form, source, 2, 1.0)
        assert layout is not None
        moves = list(layouts.moves(layout))
        assert any(move.name.startswith("blocks") for move in moves)
        for move in moves:
            plan = layouts.plan(move.layout)
            assert Schedule("auto", {}, anatomy, Target("Toy"), STEPS, plan).macs_fraction() <= 0.65 + 1e-9
