"""What is shipped, and what it says of itself."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

import dicache

ROOT = Path(__file__).parent.parent


def test_a_wheel_installed_in_a_clean_environment_runs_the_demo(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("dicache-*.whl")
    assert wheel.stat().st_size < 30e6

    # A new environment with nothing of the checkout in it. Its dependencies are those of this one, since installing
    # them again would take minutes: a line in a .pth file puts their folder on the path, but does not read the .pth
    # file in it that an editable install consists of.
    clean = tmp_path / "clean"
    venv.create(clean, with_pip=False, symlinks=True)
    python = clean / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    [packages] = clean.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    away = tmp_path / "away"
    away.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env["COLUMNS"] = "200"  # so that no table is folded

    def run(*words: str | Path) -> str:
        out = subprocess.run([str(word) for word in words], env=env, cwd=away, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        return out.stdout

    where = "import dicache, sys; print(dicache.__file__); print(*sys.path, sep='\\n')"
    file, *path = run(python, "-c", where).splitlines()
    assert Path(file).is_relative_to(packages)
    assert str(ROOT) not in path
    dicache_command = clean / "bin" / "dicache"
    assert run(dicache_command, "--version").strip().endswith(dicache.__version__)
    told = run(dicache_command, "demo", "--model", "digits", "--runs", "2", "--steps", "6", "--images", "1")
    assert "Table, profiles, schedules and pictures are in demo/" in told
    assert all(part in told for part in (away / "demo" / "results.txt").read_text().strip().split("\n\n"))


def data_of_the_package() -> set[str]:
    files = (file for file in (ROOT / "dicache").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(ROOT)) for file in files if file.suffix not in (".pyc", ".py")}


def test_the_data_of_the_package_is_not_left_out_of_the_wheel() -> None:
    # hatchling leaves out what git ignores, without a word.
    out = subprocess.run(
        ["git", "check-ignore", "--stdin"],
        input="\n".join(data_of_the_package()),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if out.returncode == 128:
        pytest.skip("no checkout of git")
    assert out.stdout == ""


def test_help_does_not_wait_for_torch() -> None:
    run = "from dicache.cli import main; main(['--help'], standalone_mode=False)"
    code = f"import sys; {run}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "False"


def test_each_heavy_library_has_one_home() -> None:
    homes = {"h5py": "profiler/storage/", "matplotlib": "figures/"}
    package = ROOT / "dicache"
    for file in package.rglob("*.py"):
        text = file.read_text()
        for library, home in homes.items():
            if re.search(rf"^\s*(import|from) {library}\b", text, re.MULTILINE):
                assert str(file.relative_to(package)).startswith(home), file


def test_each_package_imports_only_from_those_below_it() -> None:
    order = [
        "anatomy",
        "schedules",
        "runtime",
        "conformance",
        "models",
        "profiler",
        "evaluate",
        "calibrate",
        "formats",
        "figures",
        "cli",
    ]
    for level, name in enumerate(order):
        for file in (ROOT / "dicache" / name).rglob("*.py"):
            for imported in re.findall(r"(?:from|import) dicache\.(\w+)", file.read_text()):
                assert order.index(imported) <= level, f"{file.relative_to(ROOT)} imports {imported}"


def test_the_version_is_one_and_the_changelog_has_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == dicache.__version__
    assert dicache.__version__ in (ROOT / "CHANGELOG.md").read_text()
