"""Plots of a report: quality over images seen and over the number of sampling steps; the nearest pairs."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ddpm.evaluation.memorisation import Pairs
from ddpm.evaluation.metrics import Manifold
from ddpm.evaluation.report import Report, rows
from ddpm.evaluation.scores import Score
from ddpm.utils.images import figure_png

PANEL_WIDTH, PANEL_HEIGHT, LEGEND_WIDTH = 2.6, 2.8, 1.8
"""Inches."""
PANELS = (("bits/dim",), ("FID",), ("KID",), Manifold._fields[:2], Manifold._fields[2:])
"""Metrics of each panel."""
STYLES = {"solid": "-", "dashed": "--"}
"""Line styles of the metrics in a panel."""
GREY = "0.5"
PAIR_WIDTH, PAIR_HEIGHT = 1.8, 1.3


def picture(report: Report) -> bytes:
    """Quality over images seen, and over the number of sampling steps if there are several; a PNG."""
    found = _lines(report)
    lines = [line for line in found if line.is_curve] or [found[0]]
    width = PANEL_WIDTH * max(len(line.panels) for line in lines) + LEGEND_WIDTH
    figure = Figure((width, PANEL_HEIGHT * len(lines)), layout="constrained")
    for line, part in zip(lines, figure.subfigures(len(lines), squeeze=False)[:, 0], strict=True):
        colours = {label: f"C{i % 10}" for i, label in enumerate(line.curves)}
        all_axes = part.subplots(1, len(line.panels), squeeze=False)[0]
        for panel, axes in zip(line.panels, all_axes, strict=True):
            _plot(axes, panel, line, colours)
        handles = [Line2D([], [], color=c, marker=".", label=label) for label, c in colours.items() if label]
        handles.append(Line2D([], [], color=GREY, label="real against real"))
        part.legend(handles=handles, loc="outside right upper", fontsize=7, frameon=False)
    return figure_png(figure)


def nearest(pairs: Pairs) -> bytes:
    """Generated images beside their nearest training images, with their distances; a PNG."""
    columns = 4
    lines = -(-len(pairs.index) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1)  # inches: more between pairs than within them
    figure = Figure((PAIR_WIDTH * columns, PAIR_HEIGHT * lines + 0.5), layout=layout)
    figure.suptitle(
        f"generated | nearest training image, by {pairs.space}; their distance,\n"
        "and the share of held-out images that are nearer to a training image",
        fontsize=9,
    )
    all_axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in all_axes:
        axes.set_axis_off()
    for i, axes in zip(range(len(pairs.index)), all_axes, strict=False):
        left, right = (
            np.broadcast_to(image[i], (*image.shape[1:3], 3)) for image in (pairs.drawn, pairs.train)
        )
        axes.imshow(np.concatenate([left, right], axis=1), interpolation="nearest")
        axes.axvline(left.shape[1] - 0.5, color="white", linewidth=3)
        title = f"image {pairs.index[i]}: {pairs.distance[i]:.3g}\n{pairs.nearer_held_out[i]:.0%} of held-out nearer"
        axes.set_title(title, fontsize=7)
    return figure_png(figure)


class _Line(NamedTuple):
    """A row of panels."""

    x_label: str
    is_log: bool
    curves: dict[str, list[tuple[int, Score]]]
    """By legend entry: x, and all scores there."""

    @property
    def is_curve(self) -> bool:
        """Whether a curve has more than one point on the x axis."""
        return any(len({x for x, _ in points}) > 1 for points in self.curves.values())

    @property
    def panels(self) -> list[tuple[str, ...]]:
        scores = [score for points in self.curves.values() for _, score in points]
        return [panel for panel in PANELS if any(_is_of(panel, score) for score in scores)]


def _lines(report: Report) -> tuple[_Line, _Line]:
    """Scores over images seen, and over the number of sampling steps."""
    over_images, over_steps = defaultdict(list), defaultdict(list)
    has_runs = len({result.run for result in report.results}) > 1
    for score, result, drawn in rows(report):
        run, seen = [result.run] if has_runs else [], result.images_seen
        over_images[" ".join([*run, *([drawn.name] if drawn else [])])].append((seen, score))
        if drawn is not None:
            label = " ".join([*run, drawn.sample.sampler, f"at {seen:,}"])
            over_steps[label].append((drawn.sample.num_sample_steps or 0, score))
    return _Line("images seen", False, over_images), _Line("sampling steps", True, over_steps)


def _plot(axes: Axes, panel: tuple[str, ...], line: _Line, colours: Mapping[str, str]) -> None:
    titles = []
    for name, (word, style) in zip(panel, STYLES.items(), strict=False):
        floor: Score | None = None
        for label, points in line.curves.items():
            shown = sorted(((x, s) for x, s in points if _is_of((name,), s)), key=lambda point: point[0])
            if shown:
                x, scores = zip(*shown, strict=True)
                values, errors = [s.value for s in scores], [s.error for s in scores]
                looks: dict[str, Any] = {"color": colours[label], "linestyle": style, "linewidth": 1}
                axes.errorbar(x, values, errors, marker=".", capsize=2, **looks)
                floor = floor or scores[0]
        if floor is None:
            continue
        titles.append(f"{floor.name} ({word})" if len(panel) > 1 else floor.name)
        if floor.floor is not None and floor.floor_error is not None:
            low, high = floor.floor - floor.floor_error, floor.floor + floor.floor_error
            axes.axhspan(low, high, color=GREY, alpha=0.2, linewidth=0)
            axes.axhline(floor.floor, color=GREY, linewidth=1, linestyle=style)
    axes.set_title("\n".join(titles), fontsize=9)
    axes.set_xlabel(line.x_label, fontsize=8)
    axes.tick_params(labelsize=7)
    if line.is_log:
        ticks = sorted({x for points in line.curves.values() for x, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(x) for x in ticks])
        axes.set_xticks([], minor=True)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _is_of(panel: tuple[str, ...], score: Score) -> bool:
    """Whether the score is one of the panel's metrics; the terms of the bound are in no panel."""
    return score.name in panel or (score.n_real is not None and score.name.partition("-")[0] in panel)
