"""Build the wheel twice, from two clones, and see that both are the same bytes; list what it depends on.

python -m benchmarks.wheels            # two wheels; exits with 1 if they differ
python -m benchmarks.wheels licences   # name, version and licence of all that dicache needs, into docs/licences.md
"""

import hashlib
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parent.parent
LICENCES = ROOT / "docs" / "licences.md"
HEAD = (
    "# What dicache depends on",
    "",
    "With all that its dependencies need in turn, on Linux. Made by `python -m benchmarks.wheels licences`.",
    "",
    "| package | version | licence |",
    "|---|---|---|",
)


def main() -> None:
    """Build and compare, or list."""
    if sys.argv[1:] == ["licences"]:
        LICENCES.write_text(licences())
        return
    one, two = built(), built()
    sys.stdout.write(f"{one[0]}  {one[1]}\n{two[0]}  {two[1]}\n")
    if one != two:
        raise SystemExit("the two wheels differ")


def built() -> tuple[str, str]:
    """Return name and SHA-256 of a wheel, built from a copy of what git has of the checkout."""
    when = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, check=True, capture_output=True, text=True)
    with TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps"]
        subprocess.run(
            [*pip, "--no-build-isolation", "--wheel-dir", folder, str(copy)],
            check=True,
            env={**os.environ, "SOURCE_DATE_EPOCH": when.stdout.strip()},
        )
        [wheel] = Path(folder).glob("*.whl")
        return wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest()


def licences() -> str:
    """Return a table of all that dicache needs, and what that needs in turn, as it is installed here."""
    found: dict[str, Distribution] = {}
    waiting = ["dicache"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # for another system or version of Python
            continue
        for needed in found[name].requires or ():
            if "extra ==" not in needed:
                waiting.append(re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", needed)[0]).lower())  # type: ignore[index]
    del found["dicache"]
    rows = [f"| {name} | {package.version} | {licence(package)} |" for name, package in sorted(found.items())]
    return "\n".join([*HEAD, *rows]) + "\n"


def licence(package: Distribution) -> str:
    """Return what a package says of its licence, in a line."""
    about: Any = package.metadata
    named = [kind.rpartition(" :: ")[2] for kind in about.get_all("Classifier", []) if kind.startswith("License ::")]
    said = about.get("License-Expression") or ", ".join(named) or (about.get("License") or "not said").splitlines()[0]
    return str(said)


if __name__ == "__main__":
    main()
