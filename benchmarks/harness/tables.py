"""Results as Markdown, with the machine they were measured on."""

import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions, version
from pathlib import Path

from ddpm.utils.tables import Table

folder: Path | None = None
"""Where results go instead of to their own places; None: they do not."""
BY_HAND = "<!-- by hand from here on -->"
"""The mark in a result file; text below it is written by hand and kept."""


def table(names: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table in Markdown."""
    return Table(names, [[str(cell) for cell in row] for row in rows]).markdown().splitlines()


def machine(*packages: str, device: str = "cpu") -> str:
    """Today's date, the processor or GPU, and the versions of torch and of other installed packages."""
    where = processor()
    if device == "cuda":
        import torch

        where = torch.cuda.get_device_name()
    installed = [name for name in ("torch", *packages) if any(distributions(name=name))]
    versions = ", ".join(f"{name} {version(name)}" for name in installed)
    return f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} cores of {where}, {versions}"


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def result(file: Path) -> Path:
    """Where to write a result that belongs at `file`."""
    return folder / file.name if folder else file


def write(script: str, title: str, *lines: str) -> None:
    """Write a benchmark's result beside it, as Markdown, and print it; text below BY_HAND is kept."""
    file = result(Path(script).with_suffix(".md"))
    text = "\n".join([f"# {title}", "", *lines]) + "\n"
    print(text)
    _, mark, by_hand = (file.read_text() if file.exists() else "").partition(BY_HAND)
    file.write_text(text + (f"\n{mark}{by_hand}" if mark else ""))
