"""Law 6: guidance passes never share state, and an entry that is missing means compute."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from dicache import Schedule, ScheduleError, apply
from dicache.anatomy import survey
from dicache.schedules import Plan, Rule, Target
from tests.tiny import (
    CHANNELS,
    SIZE,
    STEPS,
    TEXT_TOKENS,
    TOKENS,
    Build,
    adaptive,
    arguments,
    dit,
    every_model,
    first_block,
    pixart,
    predict,
    randomised,
    replay,
    scheduled,
)
from tests.toys import Chain, toy_inputs

METHODS = ["reuse", "skip", "adaptive", "first-block"]
every_method = pytest.mark.parametrize("method", METHODS)


def schedule_of(build: Build, method: str) -> Schedule:
    if method == "adaptive":
        return adaptive(build, threshold=2)  # noise that has nothing to do with the step before changes by 1.4
    if method == "first-block":
        return first_block(build, threshold=2)
    return scheduled(build, Rule(method, "C..."))  # type: ignore[arg-type]


def given(model: nn.Module, name: int, step: int, batch: int = 2) -> dict[str, Any]:
    """Return the arguments of a pass at a step; no two are alike."""
    return arguments(model, batch=batch, seed=100 * name + step, timestep=900 - 200 * step)


def alone(build: Build, method: str, name: int, batch: int = 2) -> list[Tensor]:
    model = build()
    with apply(model, schedule_of(build, method)) as cache:
        return replay(model, cache, [given(model, name, step, batch) for step in range(STEPS)])


def together(build: Build, method: str, *, turns: list[list[tuple[int, int]]]) -> list[dict[int, Tensor]]:
    """Return what each pass gives at each step; `turns` lists the passes of a step and their batch sizes."""
    model = build()
    outputs = []
    with apply(model, schedule_of(build, method)) as cache:
        cache.begin_generation()
        for step, passes in enumerate(turns):
            cache.begin_step()
            outputs.append({name: predict(model, given(model, name, step, batch)) for name, batch in passes})
    return outputs


def plain(build: Build, name: int, step: int, batch: int = 2) -> Tensor:
    model = build()
    return predict(model, given(model, name, step, batch))


@every_model
@every_method
def test_what_a_pass_gives_alone_is_not_what_computing_gives(build: Build, method: str) -> None:
    got = alone(build, method, 0)
    assert torch.equal(got[0], plain(build, 0, 0))
    assert not torch.equal(got[1], plain(build, 0, 1))


@every_model
@every_method
def test_a_pass_that_was_missing_computes_when_it_comes_back(build: Build, method: str) -> None:
    turns = [[(0, 2), (1, 2)], [(0, 2)], [(0, 2), (1, 2)], [(0, 2), (1, 2)]]
    both = together(build, method, turns=turns)
    assert torch.equal(both[2][1], plain(build, 1, 2))
    assert torch.equal(torch.stack([step[0] for step in both]), torch.stack(alone(build, method, 0)))


@every_model
@every_method
def test_a_pass_that_appears_in_the_middle_computes_and_disturbs_nobody(build: Build, method: str) -> None:
    both = together(build, method, turns=[[(0, 4)], [(0, 4)], [(0, 4), (1, 2)], [(0, 4)]])
    assert torch.equal(both[2][1], plain(build, 1, 2))
    assert torch.equal(torch.stack([step[0] for step in both]), torch.stack(alone(build, method, 0, 4)))


@every_model
@every_method
def test_a_pass_of_another_batch_size_that_takes_the_first_place_finds_nothing(build: Build, method: str) -> None:
    both = together(build, method, turns=[[(0, 2), (1, 1)], [(1, 1)], [(0, 2), (1, 1)], [(0, 2), (1, 1)]])
    assert torch.equal(both[1][1], plain(build, 1, 1, 1))
    assert torch.equal(both[2][0], plain(build, 0, 2))
    assert torch.equal(both[2][1], plain(build, 1, 2, 1))


@every_model
def test_a_size_that_changes_on_the_way_computes(build: Build) -> None:
    model = build()
    small = given(model, 0, 1)
    if "img_ids" in small:
        small["hidden_states"], small["img_ids"] = (
            small["hidden_states"][:, : TOKENS // 2],
            small["img_ids"][: TOKENS // 2],
        )
    else:
        name = "sample" if "sample" in small else "hidden_states"
        small[name] = small[name][..., : SIZE // 2, : SIZE // 2]
    want = predict(model, small)
    with apply(model, schedule_of(build, "reuse")) as cache:
        got = replay(model, cache, [given(model, 0, 0), small])
    assert torch.equal(got[1], want)


@every_model
def test_a_rule_for_one_pass_acts_in_it_alone(build: Build) -> None:
    model = build()
    with apply(model, scheduled(build, Rule("reuse", "C.C.", context="1"))) as cache:
        cache.begin_generation()
        for step in range(STEPS):
            cache.begin_step()
            assert torch.equal(predict(model, given(model, 0, step)), plain(build, 0, step))
            second = predict(model, given(model, 1, step))
            assert torch.equal(second, plain(build, 1, step)) == (step in (0, 2))
        assert cache.stats.steps == {"0": "CCCC", "1": "C.C."}


class NamedDiT(DiTTransformer2DModel, CacheMixin):  # type: ignore[misc]
    """A model whose pipeline names its passes, as Flux and Wan do."""

    told: list[str]

    def cache_context(self, name: str) -> Any:
        self.told.append(name)
        return super().cache_context(name)


def named() -> nn.Module:
    model = NamedDiT(num_attention_heads=2, attention_head_dim=12, in_channels=CHANNELS, num_layers=3, sample_size=SIZE)
    model.told = []
    return randomised(model)


@every_method
def test_named_passes_are_told_apart_by_their_names_in_whatever_order(method: str) -> None:
    model: Any = named()
    got: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    with apply(model, schedule_of(named, method)) as cache:
        cache.begin_generation()
        for step in range(STEPS):
            cache.begin_step()
            for name in ("cond", "uncond") if step % 2 else ("uncond", "cond"):
                with model.cache_context(name):
                    got[name].append(predict(model, given(model, len(name), step)))
        assert set(cache.stats.steps) == {"cond", "uncond"}
    for name, outputs in got.items():
        assert torch.equal(torch.stack(outputs), torch.stack(alone(named, method, len(name))))


@every_method
def test_a_named_pass_that_is_left_out_leaves_the_others_alone(method: str) -> None:
    model: Any = named()
    outputs = []
    with apply(model, schedule_of(named, method)) as cache:
        cache.begin_generation()
        for step in range(STEPS):
            cache.begin_step()
            for name in ("cond", "uncond") if step != 1 else ("uncond",):
                with model.cache_context(name):
                    out = predict(model, given(model, len(name), step))
            outputs.append(out)
    assert torch.equal(torch.stack(outputs), torch.stack(alone(named, method, len("uncond"))))


def test_a_rule_for_a_named_pass_acts_in_it_alone_and_the_name_still_reaches_the_model() -> None:
    model: Any = named()
    with apply(model, scheduled(named, Rule("skip", "C.C.", context="uncond"))) as cache:
        cache.begin_generation()
        for step in range(STEPS):
            cache.begin_step()
            for name in ("cond", "uncond"):
                with model.cache_context(name):
                    predict(model, given(model, 0, step))
        assert cache.stats.steps == {"cond": "CCCC", "uncond": "C.C."}
    assert model.told == ["cond", "uncond"] * STEPS
    assert "cache_context" not in model.__dict__


@pytest.mark.parametrize(
    "names",
    [("a", "a", "a1"), ("a1", "a", "a"), ("0", None, "1"), (None, "0", None)],
    ids=lambda names: "-".join(map(str, names)),
)
def test_passes_whose_names_would_be_alike_are_told_apart(names: tuple[str | None, ...]) -> None:
    model: Any = named()
    got: list[list[Tensor]] = [[] for _ in names]
    with apply(model, schedule_of(named, "reuse")) as cache:
        cache.begin_generation()
        for step in range(STEPS):
            cache.begin_step()
            for place, name in enumerate(names):
                with nullcontext() if name is None else model.cache_context(name):
                    got[place].append(predict(model, given(model, place, step)))
        assert list(cache.stats.steps.values()) == ["C..."] * 3
        assert {name for name in names if name} <= set(cache.stats.steps)
    for place, outputs in enumerate(got):
        assert torch.equal(torch.stack(outputs), torch.stack(alone(named, "reuse", place)))


def test_a_model_whose_instance_has_a_method_for_names_keeps_it_and_is_told() -> None:
    model: Any = pixart()
    told: list[str] = []

    def own(name: str) -> Any:
        told.append(name)
        return nullcontext()

    model.cache_context = own
    with apply(model, scheduled(pixart, Rule("reuse", "C..."))) as cache:
        cache.begin_generation()
        cache.begin_step()
        with model.cache_context("cond"):
            predict(model, given(model, 0, 0))
        assert cache.stats.steps == {"cond": "C"}
    assert told == ["cond"]
    assert model.cache_context is own


# Texts of passes, and of three that share one of two conditions with one another: a text, and a mask over its tokens.
TEXTS = {letter: (ord(letter), 0) for letter in "ABC"}
PAIRS = {"A": (0, 1), "B": (0, 2), "C": (1, 1)}


def conditions(model: nn.Module, passes: dict[str, tuple[int, int]]) -> dict[str, dict[str, Tensor]]:
    made = {}
    for letter, (text, hidden) in passes.items():
        mask = torch.ones(2, TEXT_TOKENS)
        mask[:, :hidden] = 0
        given = arguments(model, seed=text)
        made[letter] = {"encoder_hidden_states": given["encoder_hidden_states"], "encoder_attention_mask": mask}
    return made


def loop(
    turns: list[str],
    method: str | None,
    *,
    names: bool = False,
    build: Build = pixart,
    passes: dict[str, tuple[int, int]] = TEXTS,
    letters: str = "C.C.C.C.",
    buffers: bool = False,
) -> tuple[list[dict[str, Tensor]], dict[str, str]]:
    """Call a model as loops do that leave guidance out for some steps: the passes of a step differ in conditions only.

    Args:
        turns: The passes of each step, a letter each.
        method: None for a plain model.
        names: Whether the loop names its passes.
        build: Makes the model.
        passes: What conditions each pass has.
        letters: Of the schedule.
        buffers: Whether the conditions of all passes are written into the same tensors, one after the other.
    """
    model: Any = build()
    given_to = conditions(model, passes)
    buffer = {key: x.clone() for key, x in given_to["A"].items()}
    outputs: list[dict[str, Tensor]] = []
    schedule = method and scheduled(build, Rule(method, letters[: len(turns)]))  # type: ignore[arg-type]
    with apply(model, schedule) if schedule else nullcontext() as cache:
        if cache:
            cache.begin_generation()
        for step, turn in enumerate(turns):
            if cache:
                cache.begin_step()
            given = arguments(model, seed=step, timestep=900 - 100 * step)
            outputs.append({})
            for letter in turn:
                written = {key: buffer[key].copy_(x) if buffers else x.clone() for key, x in given_to[letter].items()}
                with model.cache_context(letter) if names else nullcontext():
                    outputs[-1][letter] = predict(model, {**given, **written})
    return outputs, cache.stats.steps if cache else {}


def expected(turns: list[str], method: str, **options: Any) -> list[dict[str, Tensor]]:
    """Return what the passes give where each has a loop of its own, in which it is left out at the same steps."""
    alone = {
        letter: loop([letter if letter in turn else "" for turn in turns], method, **options)[0] for letter in "ABC"
    }
    return [{letter: alone[letter][step][letter] for letter in turn} for step, turn in enumerate(turns)]


def equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(
        mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)
        for mine, its in zip(one, other, strict=True)
    )


INTERVALS = [
    ["A", "A", "BA", "BA", "BA", "A"],  # a second pass that begins and is called first, and then ends
    ["A", "A", "A", "BA", "BA", "BA"],  # the same at a step that reuses
    ["A", "A", "A", "BCA", "BCA", "BA"],
    ["A", "A", "AB", "AB", "A", "A"],
    ["AB", "AB", "A", "A", "AB", "AB"],
    ["AB", "AB", "B", "B", "AB", "AB"],
    ["BA", "BA", "CBA", "CBA", "CBA", "BA"],
    ["AB", "AB", "CAB", "CAB", "BC", "AB"],
    ["A", "A", "B", "B", "A", "B"],  # one at a time
]


@pytest.mark.parametrize("turns", INTERVALS, ids="-".join)
@pytest.mark.parametrize("method", ["reuse", "skip"])
@pytest.mark.parametrize("names", [False, True])
def test_guidance_in_a_part_of_the_steps_mixes_no_passes(turns: list[str], method: str, names: bool) -> None:
    got, steps = loop(turns, method, names=names)
    assert equal(got, expected(turns, method))
    assert not equal(got, loop(turns, None)[0])
    if names:
        assert set(steps) == set("".join(turns))


@pytest.mark.parametrize(
    ("turns", "letters"),
    [
        (["ABC", "ABC", "BC", "BC"], "CC.."),
        (["ABC", "ABC", "AC", "AC"], "CC.."),
        (["ABC", "BC"], "C."),
        (["ABC", "ABC", "C"], "CC."),
        (["BAC", "BAC", "AC"], "CC."),
        (["CAB", "CAB", "AB"], "CC."),
        (["BC", "BC", "ABC", "ABC"], "CC.."),
        (["BC", "ABC", "ABC"], "C.."),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, list) else given,
)
def test_three_passes_that_share_conditions_two_by_two_are_not_mixed(turns: list[str], letters: str) -> None:
    options: dict[str, Any] = {"passes": PAIRS, "letters": letters}
    got, steps = loop(turns, "reuse", **options)
    assert equal(got, expected(turns, "reuse", **options))
    assert len(steps) == 3
    assert any("." in done for done in steps.values())


@pytest.mark.parametrize("turns", [["AB", "AB", "B", "B"], ["AB", "B", "AB"], ["A", "A", "BA", "BA"]], ids="-".join)
@pytest.mark.parametrize("counted", [True, False], ids=["counted writes", "inference tensors"])
def test_passes_whose_conditions_are_written_into_the_same_tensors_are_not_mixed(
    turns: list[str], counted: bool
) -> None:
    with torch.inference_mode(not counted):
        got, steps = loop(turns, "reuse", buffers=True, letters="C...")
    assert equal(got, expected(turns, "reuse", letters="C..."))
    assert len(steps) == 2


@pytest.mark.parametrize("method", ["reuse", "skip"])
def test_a_pass_that_begins_in_the_place_of_one_that_was_seen_once_is_refused_where_that_one_has_been_reused(
    method: str,
) -> None:
    turns = ["A", "BA", "BA", "BA"]
    with pytest.raises(ScheduleError, match=r"began at step 1 was called in the place of another.*cache_context"):
        loop(turns, method)
    got, steps = loop(turns, method, names=True)
    assert equal(got, expected(turns, method))
    assert steps == {"A": "C.C.", "B": "-CC."}


def test_a_pass_that_is_told_another_word_on_the_way_computes() -> None:
    class Told(Chain):
        def forward(self, *args: Any, kv_cache_mode: str = "extract", **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    model, inputs = Told(), toy_inputs()
    anatomy = replace(survey(Chain(), inputs), model="Told")
    schedule = Schedule("test", {}, anatomy, Target(), 4, Plan(4, (Rule("reuse", "C..."),)))
    with apply(model, schedule) as cache, torch.no_grad():
        cache.begin_generation()
        for word in ("extract", "cached", "cached", "extract"):
            cache.begin_step()
            model(*inputs.args, kv_cache_mode=word, **inputs.kwargs)
    assert cache.stats.steps == {"0": "CC.C"}


@pytest.mark.parametrize("by_place", [False, True])
def test_a_pass_that_comes_first_at_a_later_step_is_known_by_its_labels_however_they_are_given(by_place: bool) -> None:
    model = dit()
    conditional, unconditional = torch.tensor([1, 2]), torch.tensor([5, 5])
    latents = [arguments(model, seed=step)["hidden_states"] for step in range(STEPS)]

    def call(step: int, labels: Tensor) -> Tensor:
        time = torch.full((2,), 900 - 200 * step)
        with torch.no_grad():
            if by_place:
                out: Tensor = model(latents[step], time, labels).sample
            else:
                out = model(latents[step], timestep=time, class_labels=labels).sample
        return out

    want = call(3, unconditional)
    with apply(model, scheduled(dit, Rule("reuse", "C.C."))) as cache:
        cache.begin_generation()
        for step in range(STEPS):
            cache.begin_step()
            if step == 3:
                assert torch.equal(call(step, unconditional), want)
            call(step, conditional)
