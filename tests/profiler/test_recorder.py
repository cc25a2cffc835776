"""What the recorder says of a generation against what its modules really took and gave."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy, survey
from dicache.anatomy.overrides import Overrides
from dicache.models.sampling import Sampling
from dicache.profiler import Profile, ProfileError, Provenance, Run, rings
from dicache.profiler.latest import Latest
from dicache.profiler.recorder import Recorder
from dicache.runtime.apply import denoiser
from dicache.runtime.streams import Streams, Tensors
from dicache.schedules import FirstBlockPolicy, Target
from tests.tiny import every_transformer, flux, generate, pipeline_of

STEPS = 4
LAGS = 2
FIRST_LAGS = 3


@dataclass
class Seen:
    """What the modules of a model really took and gave, step by step."""

    anatomy: Anatomy
    first_input: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)  # of the model
    guided: list[Tensor] = field(default_factory=list)  # what the scheduler was given, of the first sample
    sites: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    blocks: dict[int, list[tuple[Tensors, Tensors]]] = field(default_factory=dict)  # what entered and what left

    def delta(self, start: int, stop: int, step: int, names: Sequence[str]) -> Tensor:
        """Return the change of these streams over a range of blocks, flattened, in float64."""
        into, out = self.blocks[start][step][0], self.blocks[stop - 1][step][1]
        return torch.cat([(out[name].double() - into[name].double()).flatten() for name in names])

    def first_blocks(self, count: int, step: int) -> Tensor:
        """Return the change of the latents' stream over the first blocks, as they compute it."""
        return self.blocks[count - 1][step][1]["hidden_states"] - self.blocks[0][step][0]["hidden_states"]

    def residual(self, step: int) -> list[Tensor]:
        """Return the change of each stream over each segment, batch first."""
        found = []
        for start, stop in self.anatomy.segments:
            into, out = self.blocks[start][step][0], self.blocks[stop - 1][step][1]
            found += [tensor.double() - into[name].double() for name, tensor in out.items()]
        return found


@cache
def measured(build: Any) -> tuple[Profile, Seen]:
    """Return the profile of one generation, and what the model really did in it."""
    pipeline = pipeline_of(build)
    model = denoiser(pipeline)
    anatomy = survey(model)
    seen = Seen(anatomy)

    def watch(forward: Any, then: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            then(args, kwargs, out)
            return out

        return run

    def tensors(out: Any) -> list[Tensor]:
        return [out.clone()] if isinstance(out, Tensor) else [t.clone() for t in out if isinstance(t, Tensor)]

    def watch_block(module: nn.Module, index: int) -> Any:
        streams = Streams(anatomy.blocks[index], module, module.forward)

        def look(args: Any, kwargs: Any, out: Any) -> None:
            taken, given = streams.read(args, kwargs), streams.unpack(out)
            pair = {k: v.clone() for k, v in taken.items()}, {k: v.clone() for k, v in given.items()}
            seen.blocks.setdefault(index, []).append(pair)

        return watch(module.forward, look)

    first = anatomy.blocks[0]
    with Overrides() as overrides:
        for block in anatomy.blocks:
            module = model.get_submodule(block.module)
            overrides.set(module, watch_block(module, block.index))
            for site in block.sites:
                branch = model.get_submodule(f"{block.module}.{site.module}")
                rows = seen.sites.setdefault(block.key(site), [])
                look = lambda args, kwargs, out, rows=rows: rows.append(tensors(out))  # noqa: E731
                overrides.set(branch, watch(branch.forward, look))
        entrance = model.get_submodule(f"{first.module}.{first.sites[0].entrance}")
        taken = lambda args, kwargs, out: seen.first_input.append([*args, *kwargs.values()][0].clone())  # noqa: E731
        overrides.set(entrance, watch(entrance.forward, taken))
        overrides.set(model, watch(model.forward, lambda args, kwargs, out: seen.outputs.append(out[0].clone())))
        step = pipeline.scheduler.step

        def watched(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.guided.append(model_output[0].clone())
            return step(model_output, *args, **kwargs)

        pipeline.scheduler.step = watched
        counts = range(1, FirstBlockPolicy.most_first(anatomy) + 1)
        with Recorder(pipeline, model, anatomy, LAGS, first_blocks=counts, first_block_lags=FIRST_LAGS) as recorder:
            generate(pipeline, steps=STEPS)
            passes = recorder.contexts, recorder.parts
            spans: dict[str, Any] = {"first_blocks": tuple(counts), "first_block_lags": FIRST_LAGS}
            provenance = Provenance("tiny", anatomy, Target(), {}, {}, LAGS, *passes, **spans)
            record = recorder.record(Run("1", 0), provenance)
    return Profile(provenance, (record.run,), {name: array[None] for name, array in record.arrays.items()}), seen


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


@every_transformer
def test_site_statistics_are_those_of_the_outputs(build: Any) -> None:
    profile, seen = measured(build)
    assert len(profile.provenance.contexts) == 1
    for place, key in enumerate(profile.anatomy.sites):
        out = [flat(tensors) for tensors in seen.sites[key]]
        for step in range(STEPS):
            found = {name: profile.sites[name][0, 0, step, place] for name in profile.sites}
            assert found["abs_l1"] == pytest.approx([out[step].abs().mean().item()] * LAGS, rel=1e-6)
            assert found["norm2"] == pytest.approx([out[step].square().sum().item()] * LAGS, rel=1e-6)
            for lag in range(1, LAGS + 1):
                if step < lag:
                    assert np.isnan(found["diff_l1"][lag - 1])
                    assert np.isnan(found["dot"][lag - 1])
                    continue
                before = out[step - lag]
                assert found["diff_l1"][lag - 1] == pytest.approx((out[step] - before).abs().mean().item(), rel=1e-5)
                size = (out[step].norm() * before.norm()).item()
                assert found["dot"][lag - 1] == pytest.approx((out[step] @ before).item(), abs=1e-6 * size)


@every_transformer
def test_the_delta_of_any_range_follows_from_the_products_of_blocks(build: Any) -> None:
    profile, seen = measured(build)
    anatomy = profile.anatomy
    for first, last in anatomy.segments:
        names = anatomy.blocks[last - 1].streams
        for start in range(first, last):
            for stop in range(start + 1, last + 1):
                cosine, error = profile.range_cosine(start, stop)[0, 0], profile.range_error(start, stop)[0, 0]
                assert np.isnan(cosine[0])
                assert np.isnan(error[0])
                for step in range(1, STEPS):
                    now, before = (seen.delta(start, stop, i, names) for i in (step, step - 1))
                    want = torch.cosine_similarity(now, before, dim=0).item()
                    assert cosine[step] == pytest.approx(want, abs=1e-6)
                    assert error[step] == pytest.approx(((now - before).norm() / now.norm()).item(), abs=1e-6)
                if stop == start + 1:
                    assert profile.delta_cosine[0, 0, :, start] == pytest.approx(cosine, abs=1e-12, nan_ok=True)
    with pytest.raises(ProfileError, match="no blocks 1 to"):
        profile.range_cosine(1, len(anatomy.blocks) + 1)


def test_no_delta_stands_for_blocks_of_two_segments() -> None:
    profile, _ = measured(flux)
    (_, stop), (_, end) = profile.anatomy.segments
    with pytest.raises(ProfileError, match=f"choose them within 0-{stop - 1}, {stop}-{end - 1}"):
        profile.range_error(stop - 1, stop + 1)
    assert np.isnan(profile.arrays["delta/gram"][:, :, :, :stop, stop:end]).all()


@every_transformer
def test_the_magnitude_is_that_of_the_residuals_tokens(build: Any) -> None:
    profile, seen = measured(build)
    for step in range(1, STEPS):
        ratios, distances = [], []
        for now, before in zip(seen.residual(step), seen.residual(step - 1), strict=True):
            ratios.append((now.norm(dim=-1) / before.norm(dim=-1)).flatten())
            distances.append(1 - torch.cosine_similarity(now, before, dim=-1).flatten())
        ratio, distance = torch.cat(ratios), torch.cat(distances)
        want = [ratio.mean(), ratio.std(correction=0), distance.mean()]
        assert profile.arrays["magnitude"][0, 0, step] == pytest.approx(torch.stack(want).numpy(), rel=1e-4, abs=1e-6)


@every_transformer
def test_the_body_gram_is_of_the_guided_residual(build: Any) -> None:
    profile, seen = measured(build)
    weights = profile.arrays["body/weights"][0]
    parts = profile.provenance.parts[0]
    guidance = Sampling().resolved(pipeline_of(build)).guidance or 0.0
    want = sorted([guidance, 1 - guidance]) if parts == 2 else [1.0]
    assert sorted(weights[0]) == pytest.approx(want, abs=2e-2)
    assert weights == pytest.approx(np.tile(weights[0], (STEPS, 1)), abs=2e-2)
    rows = []
    for step in range(STEPS):
        residual = torch.cat([tensor.reshape(parts, -1) for tensor in seen.residual(step)], dim=1)
        rows.append(torch.from_numpy(weights[step]) @ residual)
    guided = torch.stack(rows)
    assert profile.arrays["body/gram"][0] == pytest.approx((guided @ guided.T).numpy(), rel=1e-5)
    outputs = torch.stack([x.double().flatten() for x in seen.guided])
    size = float(outputs.square().sum(1).max())
    assert profile.arrays["body/output"][0] == pytest.approx((outputs @ outputs.T).numpy(), abs=1e-6 * size)


@every_transformer
def test_teacache_pairs_are_those_of_the_four_signals(build: Any) -> None:
    profile, seen = measured(build)
    last = len(profile.anatomy.blocks) - 1
    signals = {
        "input": [x.double() for x in seen.first_input],
        "residual": [flat(seen.residual(step)) for step in range(STEPS)],
        "body": [flat(list(seen.blocks[last][step][1].values())) for step in range(STEPS)],
        "output": [x.double() for x in seen.outputs],
    }
    for name, values in signals.items():
        found = profile.arrays[f"teacache/{name}"][0, 0]
        assert np.isnan(found[0]).all()
        for step in range(1, STEPS):
            change = (values[step] - values[step - 1]).abs().mean().item()
            size = values[step - 1].abs().mean().item()
            assert found[step] == pytest.approx([change, size], rel=1e-4), name


@every_transformer
def test_the_first_blocks_residuals_are_compared_over_all_lags(build: Any) -> None:
    profile, seen = measured(build)
    counts = profile.provenance.first_blocks
    assert len(counts) >= 2
    sizes, changes = (profile.arrays[f"first_block/{name}"][0, 0] for name in ("size", "change"))
    assert changes.shape == (STEPS, len(counts), FIRST_LAGS)
    for place, count in enumerate(counts):
        h = [seen.first_blocks(count, step) for step in range(STEPS)]
        for step in range(STEPS):
            assert sizes[step, place] == pytest.approx(h[step].abs().mean().item(), rel=1e-6)
            for lag in range(1, FIRST_LAGS + 1):
                found = changes[step, place, lag - 1]
                if step < lag:
                    assert np.isnan(found)
                else:
                    assert found == pytest.approx((h[step] - h[step - lag]).abs().mean().item(), rel=1e-6)
                    relative = profile.first_block_change(count)[0, 0, step, lag - 1]
                    assert relative == pytest.approx(found / sizes[step - lag, place], rel=1e-9)


@pytest.mark.parametrize("numbers", [1, 9, 1_000])
def test_the_latest_changes_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    monkeypatch.setattr(rings, "CACHED", numbers)
    rows = torch.randn(9, 2, 5, generator=torch.Generator().manual_seed(0))
    latest = Latest(4)
    for step, row in enumerate(rows):
        found = latest.compare([(row, torch.zeros(2, 5))])
        assert latest.bytes == 5 * 10 * 4 + 4 * max(1, min(numbers, 50))  # what it comes to, from the first step on
        want = [row.abs().sum(), *((row - rows[step - lag]).abs().sum() for lag in range(1, min(step, 4) + 1))]
        assert found[0].tolist() == pytest.approx([float(x) for x in want])
    latest.clear()
    assert latest.compare([(rows[0], rows[1])]).tolist() == [[pytest.approx(float((rows[0] - rows[1]).abs().sum()))]]


@every_transformer
def test_recording_changes_nothing_and_leaves_nothing(build: Any) -> None:
    pipeline = pipeline_of(build)
    model = denoiser(pipeline)
    want = generate(pipeline, steps=STEPS)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with Recorder(pipeline, model, survey(model), LAGS):
        assert torch.equal(generate(pipeline, steps=STEPS), want)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert "step" not in vars(pipeline.scheduler)


@every_transformer
def test_a_nan_is_found_with_its_step_and_site(build: Any, tmp_path: Path) -> None:
    pipeline = pipeline_of(build)
    model = denoiser(pipeline)
    anatomy = survey(model)
    calls = []
    mlp = model.get_submodule("transformer_blocks.1.ff")

    def spoil(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        out: Tensor = type(mlp).forward(mlp, *args, **kwargs)
        return out * torch.nan if len(calls) == 3 else out

    vars(mlp)["forward"] = spoil
    with Recorder(pipeline, model, anatomy, LAGS) as recorder:
        generate(pipeline, steps=STEPS)
        assert recorder.failure() == "step 2 in 1.mlp"
