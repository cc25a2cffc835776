"""Multiply-accumulates, against counts made by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dicache.anatomy.macs import TOTAL, MacCounter, count_macs


def test_a_linear_layer_multiplies_each_row_with_each_weight() -> None:
    layer = nn.Linear(3, 5)
    assert count_macs(lambda: layer(torch.zeros(2, 7, 3)))[TOTAL] == 2 * 7 * 3 * 5


def test_a_convolution_multiplies_its_kernel_at_each_pixel() -> None:
    layer = nn.Conv2d(3, 5, kernel_size=2, stride=2)
    assert count_macs(lambda: layer(torch.zeros(1, 3, 8, 8)))[TOTAL] == 16 * 3 * 5 * 2 * 2


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_two_products_of_queries_and_keys(masked: bool) -> None:
    query, key = torch.zeros(2, 3, 16, 8), torch.zeros(2, 3, 10, 8)  # (batch, heads, tokens, channels)
    mask = torch.zeros(2, 1, 16, 10) if masked else None
    counted = count_macs(lambda: F.scaled_dot_product_attention(query, key, key, attn_mask=mask))
    assert counted[TOTAL] == 2 * (2 * 3 * 16 * 10 * 8)


def test_element_wise_work_and_norms_count_nothing() -> None:
    x = torch.randn(2, 4, 8)
    assert count_macs(lambda: F.layer_norm(x * x + x, (8,)).softmax(-1))[TOTAL] == 0


def test_work_is_attributed_to_the_marked_modules_around_it_and_no_other() -> None:
    inner, outer = nn.Linear(2, 2), nn.Linear(4, 2)
    model = nn.Sequential(outer, inner)
    counted = count_macs(lambda: model(torch.zeros(1, 4)), model, ["0", "1"])
    assert counted == {TOTAL: 8 + 4, "0": 8, "1": 4}


def test_marking_is_undone_and_later_work_is_not_counted() -> None:
    layer = nn.Linear(2, 2)
    layers = nn.ModuleDict({"layer": layer})
    keys = set(layer.__dict__)
    counter = MacCounter()
    with counter.mark(layers, ["layer"]), counter:
        layer(torch.zeros(1, 2))
    layer(torch.zeros(1, 2))
    assert counter.macs == {TOTAL: 4, "layer": 4}
    assert set(layer.__dict__) == keys
