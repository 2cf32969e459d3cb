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
REPORT = (
    "A report of measurements: findings first, then what was measured, and how. "
    "[Results](../docs/results.md) has the findings of all reports."
)
MEASURED = "<!-- written by the program from here on -->"
BY_HAND = "<!-- by hand from here on -->"
RAW = "<!-- written by the program again: raw data -->"
"""Marks in a page. What is written by hand, the findings before MEASURED and the notes after BY_HAND, is kept."""


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


def write(script: str, title: str, *lines: str, raw: Sequence[str] = ()) -> None:
    """Write a benchmark's page beside it, as Markdown, and print what was measured; what is written by hand is kept.

    Args:
        raw: lines for the end of the page.
    """
    file = result(Path(script).with_suffix(".md"))
    findings, notes = by_hand(file.read_text() if file.exists() else "")
    parts = [f"# {title}", REPORT, findings, MEASURED, "\n".join(lines)]
    if notes:
        parts += [BY_HAND, notes]
    if raw:
        parts += [RAW, "\n".join(raw)]
    print("\n".join([f"# {title}", "", *lines, *raw]))
    file.write_text("\n\n".join(filter(None, parts)) + "\n")


def by_hand(page: str) -> tuple[str, str]:
    """What is written by hand in a page: its findings and its notes; either may be empty."""
    before, is_marked, after = page.partition(MEASURED)
    findings = before.partition(REPORT)[2] if is_marked else ""
    _, _, notes = (after or before).partition(BY_HAND)
    return findings.strip(), notes.partition(RAW)[0].strip()
