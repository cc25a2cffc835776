import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import dicache
from dicache.figures import delta_map, save, schedule_strip, similarity_maps, teacache_fit
from dicache.schedules import Rule
from tests.figures import synthetic

STARTS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.fixture
def figure() -> Figure:
    return delta_map(synthetic.profile(np.full((1, 1, 3, 2), 0.9)))


@pytest.mark.parametrize("suffix", STARTS)
def test_the_suffix_names_the_format(figure: Figure, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "made" / "on the way" / f"delta{suffix}"
    save(figure, path)
    assert path.read_bytes().startswith(STARTS[suffix])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["delta.jpg", "delta"])
def test_another_suffix_is_refused_before_anything_is_written(figure: Figure, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"written as one of \.png, \.svg, \.pdf"):
        save(figure, tmp_path / "new" / name)
    assert not (tmp_path / "new").exists()


def test_what_fails_on_the_way_leaves_the_old_picture(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "delta.png"
    path.write_bytes(b"old")

    def fail(file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save(figure, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("steps", [2, 50])
@pytest.mark.parametrize("blocks", [1, 28])
@pytest.mark.filterwarnings("error")
def test_small_and_large_are_drawn_without_a_warning(tmp_path: Path, blocks: int, steps: int) -> None:
    shape = (2, 1, steps, blocks)
    changes = dict.fromkeys(("input", "output"), np.linspace(0.1, 0.5, 2 * (steps - 1)).reshape(2, 1, steps - 1))
    profile = synthetic.profile(np.full(shape, 0.9), np.full((*shape, 2, 3), 0.8), changes)
    save(delta_map(profile), tmp_path / "delta.png")
    save(similarity_maps(profile), tmp_path / "similarity.png")
    save(teacache_fit(profile, synthetic.teacache(steps, (1.0, 0.0), (0.2, 0.4))), tmp_path / "teacache.png")
    plan = synthetic.planned("fora", blocks, Rule("reuse", "C" + "." * (steps - 1), branch="mlp"))
    save(schedule_strip([("fora", plan)]), tmp_path / "schedule.png")
    assert len(list(tmp_path.iterdir())) == 4


def fresh(code: str) -> list[str]:
    """Return what a fresh Python prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_importing_the_package_imports_no_matplotlib_and_no_torch() -> None:
    loaded = fresh("import sys, dicache.figures; print(*{name.split('.')[0] for name in sys.modules})")
    assert "dicache" in loaded
    assert not {"matplotlib", "torch", "numpy"} & set(loaded)


def test_drawing_leaves_pyplot_alone() -> None:
    names = "delta_map, image_grid, save, schedule_strip, similarity_maps, teacache_fit"
    loaded = fresh(f"import sys; from dicache.figures import {names}; print(*sys.modules)")
    assert "matplotlib.figure" in loaded
    assert "matplotlib.pyplot" not in loaded


def test_matplotlib_is_imported_nowhere_else() -> None:
    package = Path(dicache.__file__).parent
    users = {
        file.relative_to(package).parts[0]
        for file in package.rglob("*.py")
        if "import matplotlib" in file.read_text() or "from matplotlib" in file.read_text()
    }
    assert users == {"figures"}
