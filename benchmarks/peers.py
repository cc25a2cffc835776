"""Other projects' caches beside dicache: an environment that has them, their settings, and a process that runs them.

The environment is made on first use, in `build/peers`: pinned versions from the package registry, on top of the
torch and diffusers of the environment that this runs in, so that all are compared on the same ones.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "build" / "peers"
PINNED = ("cache-dit==1.5.3", "dit-smoothcache==0.1.1", "tgate==1.0.0", "DeepCache==0.1.1")  # tgate imports the last

THRESHOLDS = (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """A cache of another project and the settings that are tried of it.

    Attributes:
        name: As tables have it: the project, and what it calls the method.
        kind: Which of the worker's peers it is.
        grid: Settings.
        adaptive: Whether it decides from the latents, so that images are made one at a time.
    """

    name: str
    kind: str
    grid: tuple[Settings, ...]
    adaptive: bool = False


def grid(**axes: Sequence[Any]) -> tuple[Settings, ...]:
    """Return every combination."""
    return tuple(dict(zip(axes, values, strict=True)) for values in product(*axes.values()))


def masks(steps: int) -> list[list[int] | str]:
    """Return cache-dit's presets, and masks of a few first steps and others that are spread evenly; 1 is computed."""
    found: list[list[int] | str] = ["slow", "medium", "fast", "ultra"]
    for count in range(3, round(0.75 * steps)):
        for first in range(1, min(count, 5)):
            rest = steps - first
            places = {first + (i + 1) * rest // (count - first + 1) for i in range(count - first)}
            mask = [int(i < first or i in places) for i in range(steps)]
            if mask not in found:
                found.append(mask)
    return found


def peers(steps: int) -> list[Peer]:
    """Return all of them, for a number of steps."""
    blocks: dict[str, Sequence[Any]] = {"Fn_compute_blocks": (1, 2, 4), "Bn_compute_blocks": (0,)}
    dynamic: dict[str, Sequence[Any]] = {
        **blocks,
        "residual_diff_threshold": THRESHOLDS,
        "max_warmup_steps": (1, 3),
        "max_continuous_cached_steps": (-1, 2),
    }
    static: dict[str, Sequence[Any]] = {
        "Fn_compute_blocks": (1,),
        "Bn_compute_blocks": (0,),
        "steps_computation_mask": masks(steps),
        "steps_computation_policy": ("static",),
    }
    taylor = ("taylor 1", "taylor 2")
    expanded: dict[str, Sequence[Any]] = {"interval": range(2, 7), "order": (1, 2, 3), "warm_up": (1, 2, 3)}
    windows = ((100, 800), (100, 950), (0, 1000), (0, 800), (200, 1000))
    return [
        Peer("cache-dit DBCache", "cache_dit", grid(calibrator=("none",), **dynamic), adaptive=True),
        Peer("cache-dit DBCache + TaylorSeer", "cache_dit", grid(calibrator=taylor, **dynamic), adaptive=True),
        Peer("cache-dit SCM", "cache_dit", grid(calibrator=("none",), **static)),
        Peer("cache-dit SCM + TaylorSeer", "cache_dit", grid(calibrator=taylor, **static)),
        Peer("cache-dit SCM + FoCa", "cache_dit", grid(calibrator=("foca",), **static)),
        Peer("cache-dit SCM + DMD", "cache_dit", grid(calibrator=("dmd",), **static)),
        Peer("diffusers TaylorSeer", "taylorseer", grid(modules=("every branch",), **expanded)),
        Peer("diffusers TaylorSeer lite", "taylorseer", grid(modules=("lite",), **expanded)),
        Peer(
            "diffusers MagCache",
            "magcache",
            grid(threshold=THRESHOLDS, max_skip_steps=(1, 2, 3, 5), retention_ratio=(0.05, 0.1, 0.2)),
        ),
        Peer("diffusers FirstBlockCache", "first_block", grid(threshold=THRESHOLDS), adaptive=True),
        Peer("diffusers PAB", "pab", grid(attn=(2, 3, 5), cross=(2, 4, 8), temporal=(2, 4), window=windows)),
        Peer(
            "T-GATE",
            "tgate",
            grid(gate_step=range(3, steps, 2), sp_interval=(1, 2, 3, 5), fi_interval=(1, 2, 4), warm_up=(2,)),
        ),
    ]


def python() -> Path:
    """Return the interpreter of the peers' environment, which is made if it is not there."""
    done = ENVIRONMENT / "installed.txt"
    wanted = "\n".join((sys.version, *PINNED))
    found = ENVIRONMENT / "bin" / "python"
    if done.exists() and done.read_text() == wanted:
        return found
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    packages = next((ENVIRONMENT / "lib").glob("python*")) / "site-packages"
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *PINNED]
    subprocess.run(install, check=True)
    done.write_text(wanted)
    return found


def answers(request: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Have the worker do what a request asks for, and yield its answers as they come.

    Args:
        request: As the worker reads it.
        folder: For the request and what the worker says besides.

    Raises:
        RuntimeError: If the worker breaks off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, said = folder / "request.json", folder / "worker.log"
    file.write_text(json.dumps(request))
    command = [str(python()), "-m", "benchmarks.peers_worker", str(file)]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT)}
    with said.open("w") as log:
        worker = subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert worker.stdout is not None
            for line in worker.stdout:
                yield json.loads(line)
            if worker.wait():
                raise RuntimeError(f"the peers' process broke off with {worker.returncode}; see {said}")
        finally:
            worker.kill()
