"""What is shipped, and what it says of itself."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import dicache

ROOT = Path(__file__).parent.parent


def test_a_wheel_installed_elsewhere_has_the_model_and_runs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("dicache-*.whl")
    assert wheel.stat().st_size < 12e6
    there = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(there), str(wheel)], check=True)
    # Found before the checkout, which an editable install puts last.
    env = {**os.environ, "PYTHONPATH": str(there)}
    where = "import dicache; print(dicache.__file__)"
    out = subprocess.run(
        [sys.executable, "-c", where], env=env, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert out.stdout.startswith(str(there))
    words = ["generate", "--model", "digits", "--class", "3", "--steps", "2", "-o", "images"]
    subprocess.run([sys.executable, "-m", "dicache", *words], env=env, cwd=tmp_path, check=True)
    assert (tmp_path / "images" / "3-0.png").exists()


def test_help_does_not_wait_for_torch() -> None:
    run = "from dicache.cli import main; main(['--help'], standalone_mode=False)"
    code = f"import sys; {run}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "False"


def test_each_heavy_library_has_one_home() -> None:
    homes = {"h5py": "profiler/storage.py", "matplotlib": "figures/"}
    package = ROOT / "dicache"
    for file in package.rglob("*.py"):
        text = file.read_text()
        for library, home in homes.items():
            if re.search(rf"^\s*(import|from) {library}\b", text, re.MULTILINE):
                assert str(file.relative_to(package)).startswith(home), file


def test_each_package_imports_only_from_those_below_it() -> None:
    order = ["anatomy", "schedules", "runtime", "models", "profiler", "evaluate", "calibrate", "figures", "cli"]
    for level, name in enumerate(order):
        for file in (ROOT / "dicache" / name).rglob("*.py"):
            for imported in re.findall(r"(?:from|import) dicache\.(\w+)", file.read_text()):
                assert order.index(imported) <= level, f"{file.relative_to(ROOT)} imports {imported}"


def test_the_version_is_one_and_the_changelog_has_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == dicache.__version__
    assert dicache.__version__ in (ROOT / "CHANGELOG.md").read_text()
