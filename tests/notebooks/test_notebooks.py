"""Each notebook runs from top to bottom, in a folder where nothing else is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions
from dicache.profiler.profiling import profile_pipeline
from tests.notebooks.execute import ROOT, execute, kernel, pictures

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes of a notebook with its pictures


@pytest.fixture(scope="module")
def manager() -> Iterator[Any]:
    with kernel() as started:
        yield started


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small profile of digits, as a reader might have made it."""
    pipeline = load("digits")
    conditions = default_conditions(pipeline, 4)
    file = tmp_path_factory.mktemp("own") / "own.h5"
    return profile_pipeline(
        pipeline, "digits", file, conditions, sampling=Sampling(6), lags=2, priors=True, batch=2, progress=False
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_and_shows_what_is_committed(
    path: Path, tmp_path: Path, manager: Any
) -> None:
    notebook = nbformat.read(path, as_version=4)
    committed = pictures(notebook)
    assert path.stat().st_size < LARGEST
    execute(notebook, tmp_path, manager)
    assert not list(tmp_path.iterdir())  # whoever runs it finds nothing lying about
    assert len(pictures(notebook)) == len(committed) > 0
    assert not [output for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output]


@pytest.mark.parametrize("name", ["similarity_heatmaps", "teacache_fit", "eoc_priors"])
def test_one_line_shows_the_readers_own_profile(name: str, own: Path, tmp_path: Path, manager: Any) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    (line,) = (cell for cell in notebook.cells if cell.source.startswith("PROFILE = "))
    line.source = f"PROFILE = {str(own)!r}"
    execute(notebook, tmp_path, manager)
    assert len(pictures(notebook)) == (1 if name == "teacache_fit" else 2)
