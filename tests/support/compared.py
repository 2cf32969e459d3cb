"""Runs with made-up numbers, in folders and in memory, and the page that compares them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from types import MappingProxyType
from typing import Any

import numpy as np

from ddpm.config.json import override, to_json
from ddpm.config.presets import DIGITS
from ddpm.evaluation import comparison_page
from ddpm.evaluation.compared_run import RATE, ComparedRun
from ddpm.evaluation.comparison import Ranking
from ddpm.runs import curves, run_folder
from ddpm.runs.curves import CurveRow
from ddpm.utils import images
from support.checkpoints import checkpoint_name

STEPS = (1280, 2560, 3840)
NEWEST = 4480
"""The newest checkpoint, after the last logged step."""
COMMAND = "python jobs/train.py digits --name a"


def grid(level: int) -> np.ndarray:
    return np.full((8, 8, 3), level, np.uint8)


def make_run(
    storage: str,
    name: str,
    level: int = 0,
    status: run_folder.RunStatus = run_folder.RunStatus.STOPPED,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[str, str]:
    """Write a run's folder as training does; returns its URI and its run key.

    Args:
        changes: settings that differ from the preset's.
    """
    versions = {"version.torch": "2.13.0", "git.commit": "0123"}
    run = run_folder.open_run(
        name, storage, run_folder.Facts(preset="digits", command=COMMAND, versions=versions)
    )
    config = override(DIGITS, {"run.name": name, "data.source": "digits", **changes})
    state = {"step": NEWEST // 128, "images_seen": NEWEST, "best_held_out_loss": 0.1, "run_key": run.key}
    newest = run.location.child(checkpoint_name(NEWEST))
    newest.child("config.json").write(to_json(config).encode())
    newest.child("state.json").write(json.dumps({**state, "data_fingerprint": "0123456789ab"}).encode())
    newest.child("checksums.json").write(b"{}")
    rows = list[CurveRow]()
    for i, at in enumerate(STEPS):
        bits = {"held_out/bits_per_dim": 5.0 - i, "held_out_error/bits_per_dim": 0.25}
        values = {"train/loss": 1 / (i + 1 + level), RATE: 128.0, "other": 1.0, **bits}
        rows += [CurveRow(key, at, value, i) for key, value in {**values, "held_out/loss": math.nan}.items()]
        run.location.child(f"samples/{at:012d}.png").write(images.png_bytes(grid(level + i)))
    part, data = curves.part(0, rows, 1)
    run.location.child(part).write(data)
    run_folder.write_status(run.location, run_folder.Status(status, NEWEST, 0, 0.75, "2 cores"))
    return run.location.uri, run.key


class Page(HTMLParser):
    """Parses text, tags and images of a page."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def shown_text(compared: Sequence[ComparedRun], rankings: Sequence[Ranking] | None = None) -> str:
    """The text of the page, with single spaces."""
    return " ".join(Page(comparison_page.render(compared, rankings)).text.split())


def run(name: str, **parts: Any) -> ComparedRun:
    return ComparedRun(name, f"key{name}", f"runs/{name}", **parts)


def png(level: int) -> Callable[[], bytes]:
    return lambda: images.png_bytes(grid(level))
