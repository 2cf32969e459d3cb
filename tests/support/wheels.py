"""The wheel of this repository, in a folder of its own."""

import shutil
import sys
from pathlib import Path

from support.processes import REPO, run

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def install(folder: Path) -> Path:
    """Build the wheel from a copy of the repository, and install it alone into `folder`/site.

    Returns:
        The wheel.
    """
    source, wheels = folder / "source", folder / "wheels"
    shutil.copytree(REPO / "ddpm", source / "ddpm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source]
    for words in (build, ["install", "--no-deps", "--no-index", "--target", folder / "site"]):
        done = run([*PIP, *words, *wheels.glob("*.whl")], cwd=folder)
        assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    return wheel
