"""What `apply(..., compile=...)` takes and refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache import CacheError, apply
from dicache.runtime.compiled import Compiling
from tests.features.laws import schedule_of
from tests.tiny import dit, sample, scheduled


@pytest.mark.parametrize(
    ("compile", "said"),
    [
        ({"fullgraph": False}, "compile has no setting 'fullgraph'; it takes backend, mode, options, dynamic"),
        ("inductor", "compile must be True, False, 'cudagraphs' or settings of torch.compile: 'inductor'"),
    ],
)
def test_what_is_no_setting_is_refused(compile: Any, said: str) -> None:  # noqa: A002
    with pytest.raises(ValueError, match=said):
        apply(dit(), scheduled(dit), compile=compile)


def test_cuda_graphs_without_cuda_are_refused() -> None:
    model = dit()
    with pytest.raises(
        CacheError, match=r"CUDA graphs were asked for, and the DiT.* is on the device cpu; move it to a"
    ):
        apply(model, scheduled(dit), compile="cudagraphs")
    apply(model, scheduled(dit)).detach()  # nothing is left on it


def test_cuda_graphs_are_the_compilers_own() -> None:
    class OnCuda(nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            return iter([type("Parameter", (), {"device": torch.device("cuda", 0)})()])

    asked = Compiling.asked("cudagraphs", OnCuda())
    assert asked is not None
    assert asked.settings == {"mode": "reduce-overhead"}
    assert asked.captures


@pytest.mark.parametrize(
    ("settings", "captures"),
    [
        ({}, False),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"mode": "max-autotune"}, True),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"backend": "cudagraphs"}, True),
        ({"backend": "eager"}, False),
    ],
)
def test_which_settings_record_graphs_of_their_own(settings: dict[str, Any], captures: bool) -> None:
    assert Compiling(settings).captures is captures


class Fixed:
    """A backend whose graphs write what they make to the same places each time, as CUDA graphs do."""

    def __call__(self, graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        places: list[Any] = []

        def run(*args: Any) -> Any:
            made = graph(*args)
            if not places:
                places.extend(out.clone() if isinstance(out, Tensor) else out for out in made)
            for place, out in zip(places, made, strict=True):
                if isinstance(out, Tensor):
                    place.copy_(out)
            return tuple(places)

        return run


@pytest.mark.parametrize("method", ["reuse", "skip", "teacache"])
def test_what_a_recorded_graph_has_made_outlives_its_next_run(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, schedule = dit(), schedule_of(dit, method)
    with apply(model, schedule) as cache:
        want = sample(model, cache)
    monkeypatch.setattr(Compiling, "captures", True)
    with apply(model, schedule, compile={"backend": Fixed()}) as cache:
        for _ in range(2):
            assert torch.equal(sample(model, cache), want)
