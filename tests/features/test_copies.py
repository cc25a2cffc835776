"""Copying, saving and moving a model with a schedule attached."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dicache import CacheError, apply
from tests.features.laws import every_method, schedule_of
from tests.tiny import dit, generate, pipeline_of, sample

REFUSED = r"DiTTransformer2DModel with a schedule attached cannot be copied or pickled; call the cache's detach\(\)"


@every_method
def test_a_copy_is_refused_while_a_schedule_is_attached_and_works_afterwards(method: str) -> None:
    model = dit()
    plain = sample(model)
    with apply(model, schedule_of(dit, method)) as cache:
        want = sample(model, cache)
        for act in (copy.deepcopy, pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
            with pytest.raises(CacheError, match=REFUSED):
                act(model)
        with pytest.raises(CacheError, match=REFUSED):
            copy.copy(cache)
        assert torch.equal(sample(model, cache), want)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(sample(other), plain)


def test_a_model_is_saved_as_if_there_were_no_schedule(tmp_path: Path) -> None:
    model: Any = dit()
    plain, names = sample(model), list(model.state_dict())
    with apply(model, schedule_of(dit, "reuse")) as cache:
        sample(model, cache)
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        model.load_state_dict(model.state_dict())
    other = type(model).from_pretrained(tmp_path)
    assert torch.equal(sample(other), plain)


def test_a_pipeline_is_saved_as_if_there_were_no_schedule(tmp_path: Path) -> None:
    pipe = pipeline_of(dit)
    plain = generate(pipe)
    with apply(pipe, schedule_of(dit, "skip")):
        generate(pipe)
        pipe.save_pretrained(tmp_path)
    other = type(pipe).from_pretrained(tmp_path)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(generate(other), plain)


@every_method
def test_a_model_may_be_moved_to_another_dtype_between_generations(method: str) -> None:
    reference = dit().double()
    with apply(reference, schedule_of(dit, method)) as cache:
        want = sample(reference, cache)
    model = dit()
    with apply(model, schedule_of(dit, method)) as cache:
        sample(model, cache)
        model.double()
        assert torch.equal(sample(model, cache), want)
