"""What importing the package pulls in."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["dicache", "dicache.schedules", "dicache.anatomy"])
def test_plain_data_comes_without_torch(module: str) -> None:
    command = f"import sys, {module}; print(*sorted(name.partition('.')[0] for name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout.split()
    assert "dicache" in loaded
    assert not {"torch", "diffusers", "transformers", "h5py", "optuna", "matplotlib", "scipy"} & set(loaded)
