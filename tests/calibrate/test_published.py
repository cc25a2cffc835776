import pytest

from dicache.calibrate.published import WITHIN, Row, published_rows


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return published_rows()


@pytest.mark.slow
def test_the_papers_numbers_of_operations_are_reproduced(rows: list[Row]) -> None:
    published = [row for row in rows if row.unit != "%"]
    assert len(published) == 33
    assert {(row.what, round(row.deviation, 5)) for row in published if abs(row.deviation) > WITHIN} == set()


@pytest.mark.slow
def test_what_foras_paper_states_as_a_share_is_one_in_n_and_not_what_is_computed(rows: list[Row]) -> None:
    shares = [row for row in rows if row.unit == "%"]
    assert [row.published for row in shares] == [50.0, 33.3, 33.3, 16.7]
    assert [row.found for row in shares] == pytest.approx([51.0, 34.0, 33.6, 17.0])
    assert "50.0 % from the start" in shares[0].note


def test_a_row_is_reproduced_within_a_thousandth() -> None:
    assert Row("Delta-DiT", "a model", 85.651, 85.629).reproduced
    assert not Row("Delta-DiT", "a model", 85.651, 85.5).reproduced
