"""Each notebook runs from top to bottom, in a folder where nothing else is."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from dicache.profiler.profiling import profile_model

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(notebook: Any, folder: Path) -> None:
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    execute(nbformat.read(path, as_version=4), tmp_path)
    assert not list(tmp_path.iterdir())  # whoever runs it finds nothing lying about


def test_the_heatmaps_are_drawn_for_the_readers_own_profile(tmp_path: Path) -> None:
    own = profile_model("digits", tmp_path / "own.h5", runs=1, steps=5, lags=2, progress=False)
    notebook = nbformat.read(ROOT / "notebooks" / "similarity_heatmaps.ipynb", as_version=4)
    (line,) = (cell for cell in notebook.cells if cell.source.startswith("PROFILE = "))
    line.source = f"PROFILE = {str(own)!r}"
    execute(notebook, tmp_path)
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", ())
    ]
    assert len(pictures) == 2
