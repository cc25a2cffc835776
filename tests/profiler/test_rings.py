import pytest
import torch
from torch import Tensor

from dicache.profiler import rings
from dicache.profiler.rings import ROW, DeltaRing, SiteRing

SIZES = ((2, 5, 7), (2, 3000), (2, 5, 7))  # a row's fraction, and more than two rows a part


def outputs(seed: int, *, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Return three groups, the last of two tensors, that change slowly from seed to seed."""
    still, moving = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
    groups = []
    for shape in SIZES:
        groups.append([torch.randn(shape, generator=still) + 0.1 * torch.randn(shape, generator=moving)])
    groups[2].append(torch.randn(2, 4, generator=moving))
    return [[tensor.to(dtype) for tensor in group] for group in groups]


def filled(steps: int, depth: int = 3, dtype: torch.dtype = torch.float32) -> SiteRing:
    ring = SiteRing(outputs(0, dtype=dtype), 2, depth)
    for step in range(steps):
        if step:
            ring.advance()
        for place, tensors in enumerate(outputs(step, dtype=dtype)):
            ring.write(place, tensors)
    return ring


def flat(group: list[Tensor]) -> Tensor:
    return torch.cat([tensor.double().reshape(2, -1) for tensor in group], dim=1).flatten()


@pytest.mark.parametrize("chunk", [rings.CACHED, 1])
def test_the_sums_are_those_of_the_tensors(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(rings, "CACHED", chunk)
    found = filled(5).sums()
    for place in range(3):
        now, one, two = (flat(outputs(step)[place]) for step in (4, 3, 2))
        want = [now.abs().sum(), now @ now, now @ one, now @ two, (now - one).abs().sum(), (now - two).abs().sum()]
        assert found[place] == pytest.approx(torch.stack(want), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_summed_in_long_ones(dtype: torch.dtype) -> None:
    found = filled(2, dtype=dtype).sums()
    now, before = (flat(outputs(step, dtype=dtype)[1]) for step in (1, 0))
    assert found[1, [0, 1, 2]] == pytest.approx(torch.stack([now.abs().sum(), now @ now, now @ before]), rel=1e-6)


def test_a_group_that_is_written_twice_or_out_of_order_is_summed_as_it_was_last() -> None:
    ring = filled(2)
    ring.sums()
    ring.advance()
    for place in (2, 0, 2, 1):
        ring.write(place, outputs(9 if place == 2 else 2)[place])
    ring.write(2, outputs(2)[2])
    assert torch.equal(ring.sums(), filled(3).sums())
    assert torch.equal(ring.sketch(), filled(3).sketch())


def test_differences_are_written_as_such() -> None:
    one, two = ([outputs(seed)[0], outputs(seed + 5)[0]] for seed in (1, 2))
    ring = DeltaRing(one)
    for place in range(2):
        ring.write_change(place, two[place], one[place])
    changes = torch.stack([flat(two[place]) - flat(one[place]) for place in range(2)])
    assert torch.allclose(ring.gram()[:2, :2], changes @ changes.T, rtol=1e-6)


def test_a_ring_knows_what_it_was_made_for() -> None:
    ring = filled(1)
    assert ring.fits(outputs(5), 2)
    assert not ring.fits(outputs(5), 1)
    assert not ring.fits(outputs(5)[:2], 2)


@pytest.mark.parametrize("chunk", [rings.CACHED, 1])
def test_products_of_changes_keep_their_digits(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Neighbouring steps differ by 1e-4 here: the difference of float32 products would be right to a digit or two."""
    monkeypatch.setattr(rings, "CACHED", chunk)
    generator = torch.Generator().manual_seed(0)
    before = [[torch.randn(2, 4000, generator=generator)] for _ in range(3)]
    now = [[group[0] + 1e-4 * torch.randn(2, 4000, generator=generator)] for group in before]
    ring = DeltaRing(before)
    for step in (before, now):
        ring.advance()
        for place, group in enumerate(step):
            ring.write(place, group)
    rows = torch.stack([flat(group) for group in now])
    both = torch.cat([rows, rows - torch.stack([flat(group) for group in before])])
    assert torch.allclose(ring.gram(), both @ both.T, rtol=1e-5, atol=1e-8)
    assert ring.gram()[3:, 3:].diagonal() == pytest.approx((both[3:] ** 2).sum(1), rel=1e-6)


def test_groups_of_different_sizes_have_no_products() -> None:
    with pytest.raises(ValueError, match="different sizes"):
        DeltaRing(outputs(0))


def test_a_sketch_is_linear_and_keeps_products() -> None:
    generator = torch.Generator().manual_seed(0)
    # Some channels are a hundred times as large as the others, as in large transformers, and the width is a power of 2.
    scale = torch.ones(1024).index_fill(0, torch.tensor([3, 500]), 100.0)
    x, y = (torch.randn(1, 64, 1024, generator=generator) * scale for _ in range(2))
    mixed = 0.7 * x + 0.3 * y
    sketches = []
    for tensor in (x, y, mixed):
        ring = SiteRing([[tensor]], 1, 2)
        ring.write(0, [tensor])
        sketches.append(ring.sketch()[0, 0])
    assert sketches[0].shape == (ROW,)
    assert torch.allclose(0.7 * sketches[0] + 0.3 * sketches[1], sketches[2], atol=1e-2)
    want = (x.flatten() @ mixed.flatten()).item()
    assert (sketches[0] @ sketches[2]).item() == pytest.approx(want, rel=0.25)


def test_the_deviation_of_a_sketch_is_as_stated() -> None:
    errors = []
    for seed in range(60):
        x = torch.randn(1, 40000, generator=torch.Generator().manual_seed(seed))
        ring = SiteRing([[x]], 1, 2)
        ring.write(0, [x])
        errors.append((ring.sketch().square().sum() / x.square().sum()).item() - 1)
    deviation = torch.tensor(errors).std().item()
    assert 0.6 < deviation / (2 / ROW) ** 0.5 < 1.4
    assert abs(sum(errors) / len(errors)) < 0.02
