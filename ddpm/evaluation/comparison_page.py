"""The comparison of runs as one HTML file that needs no network.

Names, settings and images are untrusted: everything is escaped, plots show letters instead of names, images are data
URIs, and the content security policy allows only the page's own script.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from ddpm.evaluation import comparison
from ddpm.evaluation.compared_run import ComparedRun
from ddpm.evaluation.comparison import Chart, Ranking
from ddpm.evaluation.publish import write
from ddpm.evaluation.ranking import Z
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRST"
COLOURS = [f"C{i}" for i in range(10)]
LINES = ["-", "--", "-.", ":"]
MARKERS = {"ddim": "o", "ddpm": "s", "dpmpp_2m": "^", "heun": "D", "mix": "v"}
"""Marker of each sampler, where one run has several."""
WIDTH, HEIGHT = 4.4, 2.9
"""Inches of a plot."""
PX = 96
"""CSS pixels per inch."""
LOG_SPAN = 5
"""A logarithmic axis that spans more than this factor has ticks at 1, 2, 5, 10, ..."""
KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif", b"<?xml": "image/svg+xml"}
SECTIONS = {
    "runs": "Runs",
    "settings": "Settings that differ",
    "ranks": "Ranks",
    "samples": "Samples of equal seeds",
    "curves": "Curves",
    "steps": "Sampling steps",
    "trajectories": "From noise to images",
    "nearest": "Nearest training images",
}
SCRIPT = """
const slider = document.getElementById("seen");
if (slider) slider.addEventListener("input", () => {
  const at = Number(slider.dataset.positions.split(" ")[slider.value]);
  document.querySelector("output").textContent = at.toLocaleString("en");
  for (const figure of document.querySelectorAll("figure.grid")) {
    const images = [...figure.querySelectorAll("img")];
    const shown = images.filter(image => Number(image.dataset.at) <= at).pop();
    for (const image of images) image.hidden = image !== shown;
    figure.querySelector(".at").textContent =
      shown ? Number(shown.dataset.at).toLocaleString("en") + " images seen" : "no grid yet";
  }
});
"""


def store(runs: Sequence[ComparedRun], place: Location) -> None:
    """Write the page to a file.

    Raises:
        UserError: it cannot be written, or `render` fails.
    """
    write(place, render(runs))


def render(runs: Sequence[ComparedRun], rankings: Sequence[Ranking] | None = None) -> bytes:
    """The page.

    Args:
        runs: at most 20.
        rankings: those of a search; None: computed from the runs' evaluations.

    Raises:
        UserError: there are too many runs, or a picture cannot be read.
    """
    if len(runs) > len(LETTERS):
        raise UserError(f"{len(runs)} runs are too many for one page; name at most {len(LETTERS)}")
    results = comparison.results_alike(runs)
    if rankings is None:
        rankings = comparison.rankings(runs, results)
    differing = comparison.differences(runs) if any(run.settings for run in runs) else None
    positions = comparison.shared_positions(runs)
    letters = {run.key: letter for run, letter in zip(runs, LETTERS, strict=False)}
    shown = [_shown(run, letters[run.key], positions, results.get(run.key, {})) for run in runs]
    contents: dict[str, Any] = {
        "runs": shown,
        "settings": differing is not None,
        "ranks": rankings,
        "samples": positions,
        "curves": [_plotted(chart, letters) for chart in comparison.charts(runs, results)],
        "steps": [_plotted(chart, letters) for chart in comparison.step_charts(runs, results)],
        "trajectories": any(run["trajectories"] for run in shown),
        "nearest": any(run["nearest"] for run in shown),
    }
    templates = Environment(
        loader=PackageLoader("ddpm.evaluation"), autoescape=True, undefined=StrictUndefined
    )
    page = templates.get_template("comparison.html").render(
        title=f"Comparison of {', '.join(run.name for run in runs)}",
        sections={id: name for id, name in SECTIONS.items() if contents[id]},
        runs=shown,
        remarks=[f"{run.name}: {remark}" for run in runs for remark in run.remarks],
        differences=differing,
        rankings=rankings,
        positions=positions,
        sampled_unlike=", ".join(key for key in differing or () if key.startswith("sample.")),
        curves=contents["curves"],
        steps=contents["steps"],
        script=Markup(SCRIPT),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )
    return page.encode(errors="replace")


def _shown(
    run: ComparedRun, letter: str, positions: Sequence[int], results: Mapping[int, comparison.Result]
) -> dict[str, Any]:
    """A run as the template shows it."""
    hours = run.hours(run.images_seen)
    newest = [max((p for p in run.grids if p <= at), default=None) for at in positions]
    try:
        grids = {at: _data_uri(run.grids[at]()) for at in dict.fromkeys(newest) if at is not None}
        gif = _data_uri(run.trajectory()) if run.trajectory else None
    except OSError as error:
        raise UserError(f"an image of {run.where} cannot be read: {error}") from None
    trajectory = gif and {
        "src": gif,
        "alt": f"Noise becoming images, by run {letter} ({run.name})",
        "caption": "",
    }
    return {
        "key": run.key,
        "name": run.name,
        "letter": letter,
        "colour": to_hex(_look(letter)["color"]),
        "where": run.where,
        "images_seen": f"{run.images_seen:,}",
        "hours": "unknown" if hours is None else f"{hours:.3g}",
        "grids": grids,
        "trajectories": trajectory,
        "nearest": _nearest(run, letter, results),
    }


def _nearest(
    run: ComparedRun, letter: str, results: Mapping[int, comparison.Result]
) -> dict[str, str] | None:
    found = comparison.nearest(results)
    if found is None:
        return None
    at, way, share = found
    return {
        "src": _data_uri(way.nearest),
        "alt": f"Generated images of run {letter} ({run.name}) beside their nearest training images",
        "caption": f", {at:,} images seen, {way.name}: {share.value:.1%} (95 % interval {share.low:.1%} to "
        f"{share.high:.1%}) are nearer to a training image, by {share.space}, than 99 % of held-out images are; "
        f"{share.floor:.1%} are expected",
    }


def _data_uri(data: bytes) -> str:
    """An image as a data URI; empty if it is not a PNG, GIF or SVG."""
    kind = next((kind for start, kind in KINDS.items() if data.startswith(start)), None)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}" if kind else ""


def _look(letter: str) -> dict[str, Any]:
    number = LETTERS.index(letter)
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}


def _plotted(chart: Chart, letters: Mapping[str, str]) -> dict[str, Any]:
    """A chart as an SVG, with its last values as text."""
    figure = Figure((WIDTH, HEIGHT), layout="constrained")
    axes, last = figure.subplots(), []
    for (key, sampler), points in chart.curves.items():
        if not points:
            continue
        label, look = f"{letters[key]} {sampler}".strip(), _look(letters[key])
        x, y, error = np.array(points).T
        axes.plot(x, y, label=label, linewidth=1.3, marker=MARKERS.get(sampler, "."), markersize=4, **look)
        axes.fill_between(x, y - Z * error, y + Z * error, color=look["color"], alpha=0.18, linewidth=0)
        if len(x) == 1:
            axes.errorbar(x, y, Z * error, color=look["color"], capsize=3)
        last.append(f"{label} {y[-1]:.4g}")
    if chart.floor is not None:
        axes.axhline(chart.floor, color="0.5", linewidth=1)
    _scale(axes, chart)
    axes.set_xlabel(chart.x_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    file = io.BytesIO()
    # Text stored as text is small; a fixed salt makes equal plots byte-identical.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ddpm"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return {
        "title": chart.title,
        "x_label": chart.x_label,
        "src": _data_uri(file.getvalue()),
        "alt": f"{chart.title} over {chart.x_label}; last values: {', '.join(last)}",
        "width": round(WIDTH * PX),
        "height": round(HEIGHT * PX),
    }


def _scale(axes: Axes, chart: Chart) -> None:
    points = [point for curve in chart.curves.values() for point in curve]
    if chart.is_log_x:
        ticks = sorted({x for x, _, _ in points if x > 0})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    elif chart.x_label == "images seen":
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    low, high = min(y for _, y, _ in points), max(y for _, y, _ in points)
    if chart.is_log_y and low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > LOG_SPAN else MaxNLocator(5))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
