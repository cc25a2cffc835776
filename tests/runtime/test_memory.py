"""What is kept is what later steps read, no more, and is freed after its last reading."""

import pytest

from dicache import apply
from dicache.schedules import Rule
from tests.tiny import (
    BATCH,
    STEPS,
    TEXT_TOKENS,
    TOKENS,
    WIDTH,
    Build,
    anatomy_of,
    denoise,
    every_transformer,
    flux,
    generate,
    pipeline_of,
    predict,
    sample,
    scheduled,
    sd3,
    sd35,
)
from tests.tiny import arguments as given_to

TOKEN = BATCH * WIDTH * 4  # bytes of one token
MIXED = (sd3, sd35, flux)  # image and text pass their blocks side by side


def output(build: Build, *branches: str) -> int:
    """Return the bytes of the outputs of all branches of these kinds, or of all kinds, told by what they are."""
    total = 0
    for block in anatomy_of(build).blocks:
        for site in block.sites:
            kind = site.branch.split(".")[0]
            if branches and kind not in branches:
                continue
            tokens = TEXT_TOKENS if site.branch == "mlp.context" else TOKENS
            if kind in ("joint_attn", "fused"):
                tokens = TOKENS + TEXT_TOKENS
            if kind == "joint_attn" and block.returns == (None, "hidden_states"):
                tokens += TOKENS  # what it would make the text from still lies beside the image
            total += TOKEN * tokens + 4 * len(site.inner)  # and a zero in place of each inner module
    return total


def delta(build: Build, first: int, last: int) -> int:
    """Return the bytes of the delta of a range of blocks."""
    text = build in MIXED and None not in anatomy_of(build).blocks[last].returns
    return TOKEN * (TOKENS + TEXT_TOKENS if text else TOKENS)


def mlp_of_a_block(build: Build) -> int:
    """Return the bytes of the MLP's output, that of the text as well where there are two."""
    return TOKEN * (TOKENS + TEXT_TOKENS if build in MIXED else TOKENS)


def held(build: Build, *rules: Rule, steps: int = STEPS) -> list[int]:
    """Return the bytes held after each step."""
    model = build()
    with apply(model, scheduled(build, *rules)) as cache:
        return [cache.stats.bytes_held for _ in denoise(model, cache, steps=steps)]


@every_transformer
def test_holding_every_output_for_one_step_takes_one_output_a_site(build: Build) -> None:
    model = build()
    with apply(model, scheduled(build, Rule("reuse", "C.C."))) as cache:
        sample(model, cache)
        assert cache.stats.peak_bytes_held == output(build)
        assert cache.stats.bytes_held == 0


@every_transformer
def test_a_pipeline_holds_nothing_after_its_generation(build: Build) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, scheduled(build, Rule("reuse", "C.C."))) as cache:
        generate(pipe, batch=BATCH if build is flux else BATCH // 2)  # doubled by guidance, but for Flux
        assert cache.stats.peak_bytes_held == output(build)
        assert cache.stats.bytes_held == 0


@every_transformer
@pytest.mark.parametrize(
    ("letters", "outputs"),
    [("CCCC", [0, 0, 0, 0]), ("C.C.", [1, 0, 1, 0]), ("C...", [1, 1, 1, 0]), ("CC.C", [0, 1, 0, 0])],
)
def test_an_output_is_held_from_its_last_computation_to_its_last_reading(
    build: Build, letters: str, outputs: list[int]
) -> None:
    one = mlp_of_a_block(build)
    assert held(build, Rule("reuse", letters, blocks="1", branch="mlp")) == [one * count for count in outputs]
    one = delta(build, 0, 2)  # a range is one delta, however many blocks it has
    assert held(build, Rule("skip", letters, blocks="0-2")) == [one * count for count in outputs]


@every_transformer
def test_nothing_is_held_of_the_branches_of_a_skipped_range(build: Build) -> None:
    segments = anatomy_of(build).segments
    deltas = sum(delta(build, start, stop - 1) for start, stop in segments)
    assert held(build, Rule("skip", "C..C"), Rule("reuse", "C..C", branch="mlp")) == [deltas, deltas, 0, 0]


@every_transformer
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
    one = mlp_of_a_block(build)
    assert bytes_held == [one, 2 * one, one, 0] * 2


@every_transformer
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
        assert cache.stats.peak_bytes_held == 2 * mlp_of_a_block(build)
    one = mlp_of_a_block(build)
    assert bytes_held == [one, 2 * one, one, 0] * 2


@every_transformer
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


@every_transformer
def test_a_pass_that_stops_coming_leaves_no_more_than_it_kept(build: Build) -> None:
    model = build()
    with apply(model, scheduled(build, Rule("reuse", "C.CC", blocks="1", branch="mlp"))) as cache:
        cache.begin_generation()
        for step in range(STEPS):
            cache.begin_step()
            for seed in range(2 if step == 0 else 1):
                predict(model, given_to(model, seed=seed))
        assert cache.stats.bytes_held <= mlp_of_a_block(build)
        cache.begin_generation()
        cache.begin_step()
        predict(model, given_to(model))
        assert cache.stats.bytes_held == mlp_of_a_block(build)


@every_transformer
def test_an_expansion_holds_the_outputs_that_later_steps_read_and_copies_none(build: Build) -> None:
    one = mlp_of_a_block(build)
    taylor = {"predictor": "taylor", "order": 1}
    # Step 2 reads those of steps 1 and 0, step 4 those of 3 and 1.
    reuse = Rule("reuse", "CC.C.", blocks="1", branch="mlp", **taylor)  # type: ignore[arg-type]
    assert held(build, reuse, steps=5) == [one, 2 * one, one, 2 * one, 0]
    one = delta(build, 0, 2)
    skip = Rule("skip", "CC.C.", blocks="0-2", **taylor)  # type: ignore[arg-type]
    assert held(build, skip, steps=5) == [one, 2 * one, one, 2 * one, 0]


@every_transformer
def test_a_feature_map_is_held_from_its_last_computation_to_its_last_reading(build: Build) -> None:
    one = delta(build, 0, 1)
    assert held(build, Rule("skip", "C..C", blocks="0-1", predictor="feature")) == [one, one, 0, 0]
