"""A compiler that compiles nothing, and counts what it is given."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    broken = dict(counters["graph_break"])
    torch._dynamo.reset()
    assert not broken


@pytest.fixture
def counter() -> CompileCounter:
    """Runs each graph as it is; its `frame_count` is how many there are."""
    return CompileCounter()
