"""Wheels of this repository, each in a folder of its own."""

import shutil
import sys
from pathlib import Path

from support.processes import REPO, run

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def install(project: str, folder: Path) -> Path:
    """Build the wheel of the folder `project` of the repository from a copy, and install it alone into `folder`/site.

    Returns:
        The wheel.
    """
    source, wheels = folder / "source", folder / "wheels"
    for name in ("ddpm", "packages"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "build"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source / project]
    for words in (build, ["install", "--no-deps", "--no-index", "--target", folder / "site"]):
        done = run([*PIP, *words, *wheels.glob("*.whl")], cwd=folder)
        assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    return wheel
