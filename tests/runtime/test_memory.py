"""What is kept is what later steps read, no more, and is freed after its last reading."""

import pytest

from dicache import apply
from dicache.schedules import Rule
from tests.tiny import (
    BATCH,
    STEPS,
    TOKENS,
    WIDTH,
    Build,
    anatomy_of,
    both_models,
    denoise,
    generate,
    pipeline_of,
    predict,
    sample,
    scheduled,
)
from tests.tiny import arguments as given_to

OUTPUT = BATCH * TOKENS * WIDTH * 4  # bytes of a branch's output, or of a delta


def held(build: Build, *rules: Rule) -> list[int]:
    """Return the bytes held after each step."""
    model = build()
    with apply(model, scheduled(build, *rules)) as cache:
        return [cache.stats.bytes_held for _ in denoise(model, cache)]


@both_models
def test_holding_every_output_for_one_step_takes_one_output_a_site(build: Build) -> None:
    model = build()
    with apply(model, scheduled(build, Rule("reuse", "C.C."))) as cache:
        sample(model, cache)
        assert cache.stats.peak_bytes_held == len(anatomy_of(build).sites) * OUTPUT
        assert cache.stats.bytes_held == 0


@both_models
def test_a_pipeline_holds_nothing_after_its_generation(build: Build) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, scheduled(build, Rule("reuse", "C.C."))) as cache:
        generate(pipe)  # one image, doubled by guidance
        assert cache.stats.peak_bytes_held == len(anatomy_of(build).sites) * OUTPUT
        assert cache.stats.bytes_held == 0


@both_models
@pytest.mark.parametrize(
    ("letters", "outputs"),
    [("CCCC", [0, 0, 0, 0]), ("C.C.", [1, 0, 1, 0]), ("C...", [1, 1, 1, 0]), ("CC.C", [0, 1, 0, 0])],
)
def test_an_output_is_held_from_its_last_computation_to_its_last_reading(
    build: Build, letters: str, outputs: list[int]
) -> None:
    want = [OUTPUT * count for count in outputs]
    assert held(build, Rule("reuse", letters, blocks="1", branch="mlp")) == want
    assert held(build, Rule("skip", letters, blocks="0-2")) == want  # a range is one delta, however many blocks it has


@both_models
def test_nothing_is_held_of_the_branches_of_a_skipped_range(build: Build) -> None:
    assert held(build, Rule("skip", "C..C"), Rule("reuse", "C..C", branch="attn")) == [OUTPUT, OUTPUT, 0, 0]


@both_models
def test_each_guidance_pass_holds_its_own(build: Build) -> None:
    model = build()
    bytes_held = []
    with apply(model, scheduled(build, Rule("reuse", "C.C.", blocks="1", branch="mlp"))) as cache:
        cache.begin_generation()
        for _ in range(STEPS):
            cache.begin_step()
            for seed in range(2):
                predict(model, given_to(model, seed=seed))
                bytes_held.append(cache.stats.bytes_held)
    assert bytes_held == [OUTPUT, 2 * OUTPUT, OUTPUT, 0] * 2


@both_models
def test_requests_that_take_turns_each_hold_their_own_and_are_counted_together(build: Build) -> None:
    model = build()
    bytes_held = []
    with apply(model, scheduled(build, Rule("reuse", "C.C.", blocks="1", branch="mlp"))) as cache:
        turns = []
        for request in (cache.request(), cache.request()):
            with request:
                cache.begin_generation()
            turns.append(request)
        for _ in range(STEPS):
            for request in turns:
                with request:
                    cache.begin_step()
                    predict(model, given_to(model))
                bytes_held.append(cache.stats.bytes_held)
        assert cache.stats.peak_bytes_held == 2 * OUTPUT
    assert bytes_held == [OUTPUT, 2 * OUTPUT, OUTPUT, 0] * 2


@both_models
def test_the_steps_of_the_latest_generation_are_told_whoever_takes_turns_with_it(build: Build) -> None:
    model = build()
    with apply(model, scheduled(build, Rule("reuse", "C.C."))) as cache:
        requests = cache.request(), cache.request()
        turns = []
        for seed, request in enumerate(requests):
            turns.append(denoise(model, cache, seed=seed))
            with request:
                next(turns[-1])
        for _ in range(STEPS - 1):
            for request, turn in zip(requests, turns, strict=True):
                with request:
                    next(turn)
        assert cache.stats.steps == {"0": "C.C."}


@both_models
def test_a_pass_that_stops_coming_leaves_no_more_than_it_kept(build: Build) -> None:
    model = build()
    with apply(model, scheduled(build, Rule("reuse", "C.CC", blocks="1", branch="mlp"))) as cache:
        cache.begin_generation()
        for step in range(STEPS):
            cache.begin_step()
            for seed in range(2 if step == 0 else 1):
                predict(model, given_to(model, seed=seed))
        assert cache.stats.bytes_held <= OUTPUT
        cache.begin_generation()
        cache.begin_step()
        predict(model, given_to(model))
        assert cache.stats.bytes_held == OUTPUT
