"""Results as Markdown, with the machine they were measured on."""

import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path


def table(names: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(map(str, row)) + " |" for row in cells]


def machine(*packages: str, device: str = "cpu") -> str:
    """Today's date, the processor or GPU, and the versions of torch and of other packages."""
    where = processor()
    if device == "cuda":
        import torch

        where = torch.cuda.get_device_name()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} cores of {where}, {versions}"


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def write(script: str, title: str, *lines: str, by_hand: str | None = None) -> None:
    """Write a benchmark's result beside it, as Markdown, and print it.

    Args:
        by_hand: the mark in the file below which text was written by hand; that text stays.
    """
    file = Path(script).with_suffix(".md")
    text = "\n".join([f"# {title}", "", *lines]) + "\n"
    print(text)
    if by_hand is not None:
        text += f"\n{by_hand}" + (file.read_text().partition(by_hand)[2] if file.exists() else "\n")
    file.write_text(text)
