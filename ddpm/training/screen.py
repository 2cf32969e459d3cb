"""The display of a run while it trains: one screen on a terminal, one line per interval elsewhere; and its gauges.

Every node of a Ray cluster exports the gauges of its processes to Prometheus, through Ray's public `ray.util.metrics`.
The driver sets these, since it outlives the workers: `train/images_per_s` is `ray_ddpm_train_images_per_s`, labelled
with the run. Setting a gauge takes microseconds and blocks nothing.
"""

import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import pairwise
from typing import Any, Self

from ray.util.metrics import Gauge

from ddpm.training import run_state
from ddpm.utils.progress import Display, LiveText
from ddpm.utils.tables import estimate

CURVES = {"loss": "train/loss", "held-out loss": "held_out/loss", "bits/dim": "held_out/bits_per_dim"}
"""Metrics that are shown as a curve."""
WIDTH = 40
"""Columns of the bar and of a curve."""
PLAIN = "\x1b[0m"
BOLD = "\x1b[1m"
GREEN = "\x1b[32m"
MAGENTA = "\x1b[35m"
CYAN = "\x1b[36m"
LEVELS = "▁▂▃▄▅▆▇█"
ASCII_LEVELS = "._-~=+*#"


def sparkline(values: list[float], levels: str = LEVELS) -> str:
    """A curve as a line of text: the lowest value as the first of `levels`, the highest tenth as the last.

    Values that are not finite are left out; where there are more than WIDTH, each character is a mean. The highest
    tenth is clipped, since a loss begins so high that the rest would be one level.
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    count = min(WIDTH, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low = min(means)
    high = sorted(means)[-1 - count // 10]
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((min(mean, high) - low) * scale)] for mean in means)


class Screen:
    """A context that shows a run; call `update` repeatedly with the run's state.

    Args:
        waiting: returns the number of checkpoints whose curves MLflow does not have yet; None: nothing is sent.
    """

    def __init__(self, name: str, total_images: int, waiting: Callable[[], int | None]) -> None:
        self._name = name
        self._total = total_images
        self._waiting = waiting
        self._values: Mapping[str, Any] = {}
        self._curves: dict[str, dict[int, float]] = defaultdict(dict)
        self._committed = -1
        self._committed_at = 0.0
        self._began = time.monotonic()
        self._display: LiveText | Display
        if sys.stdout.isatty():
            self._display = LiveText(self._text)
        else:
            self._display = Display("images", total_images)

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.__exit__()

    def update(self, values: Mapping[str, Any]) -> None:
        """Show `values`, those of the run's RunState."""
        self._values = values
        for name, points in values.get(run_state.METRICS, {}).items():
            self._curves[name].update(points)
        committed = values.get(run_state.COMMITTED, -1)
        if committed > self._committed:
            self._committed = committed
            self._committed_at = time.monotonic()
        progress = values.get(run_state.PROGRESS)
        if isinstance(self._display, LiveText):
            self._display.refresh()
        elif progress is not None:
            speed = f"{self._speed()}  loss {progress.loss:.4f}"
            self._display.update(progress.images_seen, speed)

    def _newest(self, metric: str, otherwise: float | None = None) -> float | None:
        return next(reversed(self._curves.get(metric, {}).values()), otherwise)

    def _speed(self) -> str:
        mfu = self._newest("train/mfu")
        utilization = f"  MFU {mfu:.0%}" if mfu is not None else ""
        return f"{self._values[run_state.PROGRESS].images_per_s:,.0f} images/s{utilization}"

    def _tracked(self) -> str:
        """How many checkpoints MLflow is behind."""
        waiting = self._waiting()
        if waiting is None:
            return ""
        if waiting == 0:
            return "MLflow: up to date"
        checkpoints = "1 checkpoint" if waiting == 1 else f"{waiting} checkpoints"
        return f"MLflow: {checkpoints} behind"

    def _text(self) -> str:
        """The screen of a terminal."""
        lines = [f"{BOLD}{self._name}{PLAIN}"]
        progress = self._values.get(run_state.PROGRESS)

        def add(name: str, middle: str, right: str = "", colour: str = "") -> None:
            lines.append(f"{colour}{name:15}{middle:{WIDTH + 2}}{right}{PLAIN}")

        if progress is None:
            add("starting", f"{_duration(time.monotonic() - self._began)} for Ray's workers")
            return "\n".join(lines)
        assert isinstance(self._display, LiveText), "lines have no screen"
        if self._display.has_unicode:
            levels = LEVELS
            plus_minus = "±"
            bar = "━"
        else:
            levels = ASCII_LEVELS
            plus_minus = "+-"
            bar = "-"
        seen = progress.images_seen
        left = (self._total - seen) / progress.images_per_s if progress.images_per_s > 0 else math.inf
        done = bar * (WIDTH * seen // self._total)
        add("images", done, f"{seen:,} of {self._total:,}  {_duration(left)} left", MAGENTA)
        workers = self._values.get(run_state.WORKERS) or 1
        goodput = self._newest("train/goodput", 1.0)  # it is not logged while nothing has been lost
        useful = f"  goodput {goodput:.1%}" if self._curves else ""
        group = "1 worker" if workers == 1 else f"{workers} workers"
        add("speed", self._speed(), f"{group}{useful}")
        for name, metric in CURVES.items():
            newest = self._newest(metric)
            if newest is None:
                continue
            curve = sparkline(list(self._curves[metric].values()), levels=levels)
            error = self._newest(f"held_out_error/{metric.partition('/')[2]}")
            shown = f"{newest:.4f}" if error is None else estimate(newest, error).replace("±", plus_minus)
            add(name, curve, shown, CYAN if name == "loss" else GREEN)
        if self._committed >= 0:
            age = _duration(time.monotonic() - self._committed_at)
            add("checkpoint", f"{self._committed:,} images, {age} ago", self._tracked())
        share = self._newest("train/gpu_peak_memory_share")
        if share is not None:
            add("GPU memory", f"{share:.0%} at its peak")
        return "\n".join(lines)


class Gauges:
    """The gauges of one run; they end after the last `update`, since Ray 2.60 drops a gauge that is not set again.

    Args:
        images_seen: position of the run until its workers report one.
        waiting: returns the number of checkpoints whose curves MLflow does not have yet; None: nothing is sent.
    """

    def __init__(
        self, run: str, total_images: int, images_seen: int, waiting: Callable[[], int | None]
    ) -> None:
        self._run = {"run": run}
        self._waiting = waiting
        self._position = {"images_seen": images_seen, "total_images": total_images}
        self._gauges: dict[str, Gauge] = {}

    def update(self, values: Mapping[str, Any]) -> None:
        """Set every gauge from `values`, those of the run's RunState."""
        if progress := values.get(run_state.PROGRESS):
            self._position["images_seen"] = progress.images_seen
        workers = values.get(run_state.WORKERS) or 0
        newest = self._position | {"workers": workers}
        waiting = self._waiting()
        if waiting is not None:
            newest["mlflow_checkpoints_behind"] = waiting
        metrics = values.get(run_state.METRICS, {})
        newest |= {name: points[-1][1] for name, points in metrics.items()}
        for name, value in newest.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge("ddpm_" + re.sub(r"\W", "_", name), name, ("run",))
            self._gauges[name].set(float(value), self._run)


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, 0:01:07."""
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "?"
