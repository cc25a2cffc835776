"""What replaying a schedule pulls in."""

import subprocess
import sys


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh Python has after a statement."""
    command = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_runtime_is_light_to_import() -> None:
    loaded = loaded_by("import dicache.runtime")
    assert "torch" in loaded
    heavy = {"optuna", "h5py", "matplotlib", "scipy", "diffusers", "transformers", "click", "PIL"}
    assert not heavy & loaded


def test_the_package_itself_gives_apply_without_more() -> None:
    loaded = loaded_by("from dicache import apply, Schedule")
    assert not {"optuna", "h5py", "matplotlib", "scipy", "diffusers"} & loaded
