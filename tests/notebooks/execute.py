"""Run notebooks, and write them with what they show: `python -m tests.notebooks.execute notebooks/*.ipynb`."""

import base64
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # seconds that a cell, or a kernel that is slow to answer, may take


@contextmanager
def kernel() -> Iterator[Any]:
    """Start a kernel that imports this checkout, and stop it in the end."""
    from jupyter_client.manager import start_new_kernel

    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    manager, client = start_new_kernel(env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    try:
        yield manager
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def execute(notebook: Any, folder: Path, manager: Any) -> None:
    """Run a notebook from top to bottom in a folder, with no names left from what the kernel ran before."""
    fresh = f"import os\nos.chdir({str(folder)!r})\n%reset -f"
    first = nbformat.v4.new_code_cell(fresh)
    notebook.cells.insert(0, first)
    try:
        NotebookClient(notebook, km=manager, timeout=TIMEOUT, startup_timeout=TIMEOUT, record_timing=False).execute()
    finally:
        notebook.cells.remove(first)


def pictures(notebook: Any) -> list[Any]:
    """Return the data of each output that is a picture."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output["data"] for output in outputs if "image/png" in output.get("data", {})]


def shrink(data: Any) -> None:
    """Write a picture in 256 colours, which no eye tells from more in a drawing, and a third as large."""
    image = Image.open(BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
    file = BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    data["image/png"] = base64.b64encode(file.getvalue()).decode()


def main(paths: list[str]) -> None:
    with kernel() as manager:
        for path in paths:
            notebook = nbformat.read(path, as_version=4)
            with tempfile.TemporaryDirectory() as folder:
                execute(notebook, Path(folder), manager)
            for data in pictures(notebook):
                shrink(data)
            for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
                cell.execution_count = number
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
