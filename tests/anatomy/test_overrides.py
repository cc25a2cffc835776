"""Replaced forwards, and what is put back."""

import pytest
import torch
from torch import nn

from dicache.anatomy.overrides import Overrides
from dicache.anatomy.signal import l1_change


def test_only_the_instance_is_changed_and_it_is_restored() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    want = one(x)
    with Overrides() as overrides:
        overrides.set(one, lambda _: "replaced")
        assert one(x) == "replaced"
        assert isinstance(other(x), torch.Tensor)
        assert list(overrides) == [one]
    assert "forward" not in one.__dict__
    assert torch.equal(one(x), want)


def test_a_forward_that_was_on_the_instance_comes_back_after_an_exception() -> None:
    layer = nn.Linear(2, 2)
    mine = layer.forward = lambda x: x  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError, match="stop"), Overrides() as overrides:  # noqa: PT012
        overrides.set(layer, lambda _: None)
        overrides.set(layer, lambda _: None)  # twice: the first one is not mistaken for the original
        assert overrides.original(layer) is mine
        raise RuntimeError("stop")
    assert layer.__dict__["forward"] is mine


def test_the_original_is_the_same_before_and_after_replacing() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    overrides = Overrides()
    want = overrides.original(layer)(x)
    overrides.set(layer, lambda _: None)
    assert torch.equal(overrides.original(layer)(x), want)
    overrides.clear(layer)
    overrides.clear(layer)  # nothing left to clear
    assert torch.equal(layer(x), want)


def test_the_l1_change_is_the_mean_difference_and_the_mean_of_what_was() -> None:
    now, before = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[2.0, -2.0], [0.0, 4.0]])
    change, size = l1_change(now, before)
    assert (float(change), float(size)) == ((1 + 0 + 3 + 4) / 4, (2 + 2 + 0 + 4) / 4)


def test_the_l1_change_of_half_precision_is_added_up_in_float32() -> None:
    many = torch.ones(70_000, dtype=torch.float16)  # more than the largest half
    change, size = l1_change(2 * many, many)
    assert change.dtype == size.dtype == torch.float32
    assert (float(change), float(size)) == (1.0, 1.0)
