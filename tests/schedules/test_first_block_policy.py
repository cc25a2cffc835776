"""FirstBlockCache's rule, on distances that a reader can follow."""

import math
from dataclasses import replace
from typing import Any

import pytest

from dicache.schedules import FirstBlockPolicy, PlanError, Schedule, Target
from dicache.schedules.policies import read_policy
from tests.tiny import anatomy_of, dit, flux


def decisions(distances: list[float], **settings: Any) -> str:
    """Return a letter for each step of a run with these distances from step 1 on, whatever was computed before."""
    policy = FirstBlockPolicy(**{"threshold": 0.5, **settings})
    memory = policy.remember()
    return "".join(
        "C" if policy.decide(step, len(distances) + 1, x, memory) else "." for step, x in enumerate([None, *distances])
    )


def test_what_is_below_the_threshold_is_skipped_and_nothing_is_added_up() -> None:
    assert decisions([0.25, 0.25, 0.25, 0.75, 0.25, 0.5]) == "C...C.C"


def test_a_distance_equal_to_the_threshold_computes_as_in_paraattention_or_is_reused_as_in_diffusers() -> None:
    assert decisions([0.5, 0.25, 0.5]) == "CC.C"
    assert decisions([0.5, 0.25, 0.5], at_threshold="reuse") == "C..."
    assert decisions([0.5000001], at_threshold="reuse") == "CC"


def test_the_warm_up_and_the_last_steps_are_computed() -> None:
    assert decisions([0.0] * 7, first_steps=3) == "CCC....."
    assert decisions([0.0] * 7, first_steps=3, last_steps=2) == "CCC...CC"
    assert decisions([0.0] * 7) == "C......."


def test_no_more_steps_in_a_row_are_skipped_than_may_be() -> None:
    assert decisions([0.0] * 8, max_continuous=1) == "C.C.C.C.C"
    assert decisions([0.0] * 8, max_continuous=3) == "C...C...C"
    assert decisions([0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0], max_continuous=3) == "C..C...C."  # counted from each


def test_no_more_steps_of_a_generation_are_skipped_than_may_be() -> None:
    assert decisions([0.0, 0.0, 0.9, 0.0, 0.0, 0.0], max_cached=3) == "C..C.CC"
    assert decisions([0.0] * 6, max_cached=4, max_continuous=2) == "C..C..C"
    assert decisions([0.0] * 3, max_cached=0) == "CCCC"


def test_what_is_not_known_or_not_a_number_computes() -> None:
    for threshold in (0.5, 1e300):
        for at_threshold in ("compute", "reuse"):
            assert decisions([math.nan, math.inf, 0.0], threshold=threshold, at_threshold=at_threshold) == "CCC."
    policy = FirstBlockPolicy(0.5)
    memory = policy.remember()
    assert policy.decide(4, 9, None, memory)


@pytest.mark.parametrize("at_threshold", ["compute", "reuse"])
def test_a_threshold_of_zero_computes_everything(at_threshold: str) -> None:
    assert decisions([0.0] * 5, threshold=0.0, at_threshold=at_threshold) == "CCCCCC"


def test_what_was_compared_is_remembered() -> None:
    policy = FirstBlockPolicy(0.5, max_continuous=1)
    memory = policy.remember()
    told = []
    for step, x in enumerate([None, 0.25, 0.125, 0.75]):
        policy.decide(step, 4, x, memory)
        told.append(memory.distance)
    assert told == [None, 0.25, None, 0.75]  # at step 2 nothing is compared: it is computed in any case


def test_between_the_first_and_the_last_blocks_it_skips_all() -> None:
    assert FirstBlockPolicy(0.1).skipped(anatomy_of(dit)) == (1, 4)
    assert FirstBlockPolicy(0.1, 2, 1).skipped(anatomy_of(dit)) == (2, 3)
    assert FirstBlockPolicy(0.1, 3).skipped(anatomy_of(flux)) == (3, 5)  # all that have a stream of their own for text
    blocks = anatomy_of(dit).blocks
    assert FirstBlockPolicy(0.1, 2, 1).macs_saved(anatomy_of(dit)) == blocks[2].macs


def test_blocks_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(PlanError, match=r"the first 4 blocks .* leave a block to skip; .* take a first of 1 to 3"):
        FirstBlockPolicy(0.1, 4).skipped(anatomy_of(dit))
    with pytest.raises(PlanError, match=r"the first 2 and the last 2 of the 4 blocks .* take a last of at most 1"):
        FirstBlockPolicy(0.1, 2, 2).skipped(anatomy_of(dit))
    with pytest.raises(PlanError, match=r"the first 4 .* 5 blocks of this Flux.* first segment is 0-2; .* 1 to 3"):
        FirstBlockPolicy(0.1, 4).skipped(anatomy_of(flux))
    alone = replace(anatomy_of(dit), blocks=anatomy_of(dit).blocks[:1], segments=((0, 1),))
    with pytest.raises(PlanError, match="the method does not fit the model"):
        FirstBlockPolicy(0.1).skipped(alone)
    nameless = replace(anatomy_of(dit).blocks[0], returns=("image", "text"))
    two = replace(anatomy_of(dit), blocks=(nameless, *anatomy_of(dit).blocks[1:]))
    with pytest.raises(PlanError, match="the streams image, text, and none of them is named hidden_states or x"):
        FirstBlockPolicy(0.1).skipped(two)
    assert FirstBlockPolicy.most_first(two) == 0  # and a profile does without
    with pytest.raises(PlanError, match="lie in one segment"):
        Schedule("first-block", {}, anatomy_of(flux), Target(), 4, policy=FirstBlockPolicy(0.1, 4))


def test_it_is_written_and_read() -> None:
    policy = FirstBlockPolicy(0.25, 2, 1, 3, None, "reuse", first_steps=4, last_steps=1)
    content = policy.to_json()
    assert content == {
        "name": "first-block",
        "threshold": 0.25,
        "first": 2,
        "last": 1,
        "max_continuous": 3,
        "max_cached": None,
        "at_threshold": "reuse",
        "first_steps": 4,
        "last_steps": 1,
    }
    assert read_policy(content) == policy


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"threshold": -0.1}, "the threshold must be 0 or more, found -0.1"),
        ({"threshold": math.nan}, "must be finite"),
        ({"threshold": "0.1"}, "must be finite"),
        ({"first": 0}, "first must be a whole number of 1 or more, found 0"),
        ({"first": 1.5}, "first must be a whole number"),
        ({"last": -1}, "last must be a whole number of 0 or more, found -1"),
        ({"max_continuous": 0}, "max_continuous must be a whole number of 1 or more, found 0"),
        ({"max_cached": True}, "max_cached must be a whole number of 0 or more, found True"),
        ({"first_steps": 0}, "first_steps must be 1 or more"),
        ({"last_steps": -1}, "last_steps 0 or more"),
        ({"at_threshold": "skip"}, "at_threshold must be one of compute, reuse, found 'skip'"),
        ({"colour": 1}, "unknown or missing key 'colour'"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said) as told:
        read_policy({**FirstBlockPolicy(0.1).to_json(), **wrong})
    assert "first-block" in str(told.value)
