import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.mask import Mask, steps_of
from dicache.calibrate.methods import METHODS, planned_schedule
from dicache.schedules import Schedule, Target
from tests.calibrate.test_fora import TWO_BLOCKS


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("0-10:2,11-", (1, 3, 5, 7, 9)),  # EOC's mask of a quarter
        ("0-:2", tuple(range(1, 20, 2))),  # and of half
        ("0,2,4,6,8,10,11,12-19", (1, 3, 5, 7, 9)),
        ("0-", ()),
    ],
)
def test_what_is_not_listed_is_held_in_all_branches(text: str, held: tuple[int, ...]) -> None:
    want = "".join("R" if step in held else "C" for step in range(20))
    assert set(Mask({"*": text}).plan(TWO_BLOCKS, 20).table(TWO_BLOCKS).values()) == {want}


def test_each_kind_of_branch_may_have_its_own_steps() -> None:
    alone = Mask({"mlp": "0,3"}).plan(TWO_BLOCKS, 4).table(TWO_BLOCKS)
    assert alone == {"0.attn": "CCCC", "0.mlp": "CRRC", "1.attn": "CCCC", "1.mlp": "CRRC"}
    with_others = Mask({"*": "0,2", "mlp": "0-"}).plan(TWO_BLOCKS, 4).table(TWO_BLOCKS)
    assert with_others == {"0.attn": "CRCR", "0.mlp": "CCCC", "1.attn": "CRCR", "1.mlp": "CCCC"}


def test_the_schedule_carries_the_list_as_it_was_written() -> None:
    schedule = planned_schedule(Mask({"*": "0-:2"}), TWO_BLOCKS, Target(), 4)
    assert Schedule.from_json(schedule.to_json()).settings == {"steps_computed": {"*": "0-:2"}}
    assert schedule.macs_fraction() == pytest.approx(1 - 20 / 60)  # as FORA's with an interval of 2
    assert METHODS["mask"] is Mask


def test_steps_are_counted_from_zero_and_ranges_hold_both_ends() -> None:
    assert steps_of("0, 3,5-7", 8) == {0, 3, 5, 6, 7}
    assert steps_of("6-", 8) == {6, 7}
    assert steps_of("1-7:3", 8) == {1, 4, 7}


@pytest.mark.parametrize(
    ("computed", "message"),
    [
        ({}, "no steps are given"),
        ({"*": "0,half"}, "'half' is no step .* write 7, 3-9"),
        ({"*": "0,20"}, r"no step 20 of 20; the steps are 0-19"),
        ({"*": "0,9-3"}, "'9-3' does not rise"),
        ({"*": "0-9:0"}, "'0-9:0' does not rise"),
        ({"*": "1-"}, "step 0 must be computed"),
        ({"cross_attn": "0"}, "cross_attn, but Toy has attn, mlp"),
        ({"nonsense": "0-"}, "unknown branch 'nonsense'"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_needed(computed: dict[str, str], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Mask(computed).plan(TWO_BLOCKS, 20)
