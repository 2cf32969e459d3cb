"""Charts of scores and curves, and a report's picture of them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from ddpm.evaluation.bits_per_dim import BOUND_TERMS
from ddpm.evaluation.ranking import Z
from ddpm.evaluation.results import NearerShare, Report, Score, rows
from ddpm.utils.images import figure_png

IMAGES_SEEN = "images seen"
STEPS = "sampling steps"
"""Labels of the x axes."""
PANEL_WIDTH = 2.4
PANEL_HEIGHT = 2.8
LEGEND_WIDTH = 1.8
"""Inches."""
LOG_SPAN = 5
"""A logarithmic axis that spans more than this factor has ticks at 1, 2, 5, 10, ..."""
GREY = "0.5"


class ChartPoint(NamedTuple):
    """One point of a curve."""

    x: float
    """Images seen, unless the chart says otherwise."""
    value: float
    error: float = 0.0
    """Standard error; 0: unknown."""


@dataclass(frozen=True)
class Chart:
    """Curves of one metric, by label."""

    title: str
    x_label: str
    curves: dict[str, list[ChartPoint]]
    is_log_y: bool = False
    floor: float | None = None
    floor_error: float | None = None

    @property
    def has_curve(self) -> bool:
        """Whether a curve has more than one position."""
        return any(len({point.x for point in points}) > 1 for points in self.curves.values())


Scored = tuple[str, float, Score]
"""A curve's label, a position, and the score there."""


def charts_of(x_label: str, scored: Iterable[Scored]) -> dict[str, Chart]:
    """A chart for each metric."""
    charts: dict[str, Chart] = {}
    for label, x, score in scored:
        new = Chart(score.name, x_label, {}, floor=score.floor, floor_error=score.floor_error)
        error = score.error if math.isfinite(score.error) else 0.0
        curve = charts.setdefault(score.name, new).curves.setdefault(label, [])
        curve.append(ChartPoint(x, score.value, error))
    return charts


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
    axes.set_xlabel(chart.x_label, fontsize=9)
    axes.tick_params(labelsize=8)
    _scale(axes, chart)


def picture(report: Report) -> bytes:
    """Quality over images seen, and over the number of sampling steps if there are several; a PNG."""
    lines = _lines(report)
    lines = [line for line in lines if any(chart.has_curve for chart in line)] or lines[:1]
    width = PANEL_WIDTH * max(map(len, lines)) + LEGEND_WIDTH
    figure = Figure((width, PANEL_HEIGHT * len(lines)), layout="constrained")
    for line, part in zip(lines, figure.subfigures(len(lines), squeeze=False)[:, 0], strict=True):
        labels = dict.fromkeys(label for chart in line for label in chart.curves)
        looks = {label: {"color": f"C{i % 10}"} for i, label in enumerate(labels)}
        for chart, axes in zip(line, part.subplots(1, len(line), squeeze=False)[0], strict=True):
            draw_chart(axes, chart, looks)
            axes.set_title(chart.title, fontsize=9)
        handles = [
            Line2D([], [], marker="o", label=label, color=look["color"])
            for label, look in looks.items()
            if label
        ]
        handles.append(Line2D([], [], color=GREY, label="real against real"))
        part.legend(handles=handles, loc="outside right upper", fontsize=7, frameon=False)
    return figure_png(figure)


def _lines(report: Report) -> list[list[Chart]]:
    """The charts over images seen, and those over the number of sampling steps; labels of curves are for the legend."""
    over_images: list[Scored] = []
    over_steps: list[Scored] = []
    has_runs = len({result.run for result in report.results}) > 1
    for score, result, drawn in rows(report):
        if score.name in BOUND_TERMS or isinstance(score, NearerShare):
            continue
        run = f"{result.run} " if has_runs else ""
        if drawn is None:
            over_images.append((run.rstrip(), result.images_seen, score))
        else:
            over_images.append((f"{run}{drawn.name}", result.images_seen, score))
            label = f"{run}{drawn.sample.sampler} at {result.images_seen:,}"
            over_steps.append((label, drawn.sample.num_sample_steps or 0, score))
    return [list(charts_of(IMAGES_SEEN, over_images).values()), list(charts_of(STEPS, over_steps).values())]


def _scale(axes: Axes, chart: Chart) -> None:
    """Scales and ticks: the number of sampling steps is logarithmic, and other numbers begin at 0."""
    x, y, _ = np.array([point for points in chart.curves.values() for point in points]).T
    if chart.x_label == STEPS:
        ticks = sorted(set(x[x > 0]))
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set_xticks([], minor=True)
    else:
        axes.set_xlim(0, 1.05 * x.max() or 1)  # one point alone has no range of its own
    if chart.x_label == IMAGES_SEEN:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if chart.is_log_y and y.min() > 0:
        axes.set_yscale("log")
        spans_much = y.max() / y.min() > LOG_SPAN
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if spans_much else MaxNLocator(5))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
