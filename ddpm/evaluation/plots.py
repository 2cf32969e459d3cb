"""Charts of scores and curves over images seen."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ddpm.evaluation.ranking import Z
from ddpm.runs.evaluations import Score

GREY = "0.5"


class ChartPoint(NamedTuple):
    """One point of a curve."""

    x: float
    """Images seen."""
    value: float
    error: float = 0.0
    """Standard error; 0: unknown."""


@dataclass(frozen=True)
class Chart:
    """Curves of one metric, by label."""

    title: str
    curves: dict[str, list[ChartPoint]]
    is_log_y: bool = False
    floor: float | None = None
    floor_error: float | None = None


Scored = tuple[str, float, Score]
"""A curve's label, a position, and the score there."""


def charts_of(scored: Iterable[Scored]) -> list[Chart]:
    """A chart for each metric."""
    charts: dict[str, Chart] = {}
    for label, x, score in scored:
        new = Chart(score.name, {}, floor=score.floor, floor_error=score.floor_error)
        error = score.error if math.isfinite(score.error) else 0.0
        curve = charts.setdefault(score.name, new).curves.setdefault(label, [])
        curve.append(ChartPoint(x, score.value, error))
    return list(charts.values())


def draw_chart(axes: Axes, chart: Chart, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the curves of a chart with their 95 % intervals, and, in grey, the value of real images.

    Args:
        looks: the colour of each curve, and other arguments of Axes.plot.
    """
    for label, points in chart.curves.items():
        x, y, error = np.array(sorted(points)).T
        look = {"marker": "o", "markersize": 3 if len(x) > 1 else 8, **looks[label]}
        axes.plot(x, y, linewidth=1.3, **look)
        axes.fill_between(x, y - Z * error, y + Z * error, color=look["color"], alpha=0.18, linewidth=0)
        if len(x) == 1:
            axes.errorbar(x, y, Z * error, color=look["color"], capsize=5)
    if chart.floor is not None:
        spread = Z * (chart.floor_error or 0)
        axes.axhspan(chart.floor - spread, chart.floor + spread, color=GREY, alpha=0.2, linewidth=0)
        axes.axhline(chart.floor, color=GREY, linewidth=1)
    axes.set_xlabel("images seen", fontsize=9)
    axes.tick_params(labelsize=8)
    last = max(point.x for points in chart.curves.values() for point in points)
    axes.set_xlim(0, 1.05 * last or 1)  # one point alone has no range of its own
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if chart.is_log_y:
        axes.set_yscale("log")
