"""The comparison of runs as one HTML file that needs no network.

Names, settings and images are untrusted: everything is escaped, plots show letters instead of names, images are data
URIs, and the content security policy allows only the page's own script.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ddpm.evaluation import comparison, plots
from ddpm.evaluation.compared_run import ComparedRun, Read
from ddpm.evaluation.comparison import Ranking
from ddpm.evaluation.plots import Chart
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error
from ddpm.utils.tables import estimate

LETTERS = "ABCDEFGHIJKLMNOPQRST"
LINES = ["-", "--", "-.", ":"]
MARKERS = {"ddim": "o", "ddpm": "s", "dpmpp_2m": "^", "heun": "D", "mix": "v"}
"""Marker of each sampler, where one run has several."""
WIDTH, HEIGHT = 5.2, 3.0
"""Inches of a plot."""
PX = 96
"""CSS pixels per inch."""
KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif", b"<?xml": "image/svg+xml"}


def render(runs: Sequence[ComparedRun], rankings: Sequence[Ranking] | None = None) -> bytes:
    """The page.

    Args:
        runs: at most 20.
        rankings: those of a search; None: computed from the runs' evaluations.
    """
    if len(runs) > len(LETTERS):
        raise UserError(f"{len(runs)} runs are too many for one page; name at most {len(LETTERS)}")
    results, num_held_out = comparison.results_alike(runs)
    letters = {run.key: letter for run, letter in zip(runs, LETTERS, strict=False)}
    names = {run.key: f"{letters[run.key]} ({run.name})" for run in runs}
    step = None
    if rankings is None:
        rankings = comparison.rankings(runs, results)
        step = comparison.next_step(runs, results, num_held_out, rankings, names)
    differing = comparison.differences(runs) if any(run.settings for run in runs) else None
    positions = comparison.shared_positions(runs)
    environment = Environment(
        loader=PackageLoader("ddpm.evaluation"), autoescape=True, undefined=StrictUndefined
    )
    environment.globals |= {"estimate": estimate, "image": _image, "data_uri": _data_uri}
    script = environment.get_template("comparison.js").render()
    page = environment.get_template("comparison.html").render(
        title=f"Comparison of {', '.join(run.name for run in runs)}",
        runs=runs,
        letters=letters,
        colours={key: to_hex(_look(letter)["color"]) for key, letter in letters.items()},
        names=names,
        has_several_data=len({run.data for run in runs if run.data}) > 1,
        verdicts=list(comparison.verdicts(rankings, names)),
        step=step,
        positions=positions,
        grids={run.key: _grids(run, positions) for run in runs},
        facts=list(dict.fromkeys(title for run in runs for title in run.facts)),
        differing=differing,
        sampled_unlike=", ".join(key for key in differing or () if key.startswith("sample.")),
        rankings=rankings,
        curves=list(comparison.charts(runs, results)),
        steps=list(comparison.step_charts(runs, results)),
        plot=partial(_plot, letters),
        plot_size=(round(WIDTH * PX), round(HEIGHT * PX)),
        nearest=[(run, *shown) for run in runs for shown in comparison.nearest(results.get(run.key, {}))],
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page.encode(errors="replace")


def _grids(run: ComparedRun, positions: Sequence[int]) -> dict[int, str]:
    """A run's grids, the newest one at each position."""
    newest = [max((p for p in run.grids if p <= at), default=None) for at in positions]
    return {at: _image(run, run.grids[at]) for at in dict.fromkeys(newest) if at is not None}


def _image(run: ComparedRun, read: Read) -> str:
    with as_user_error(f"an image of {run.where} cannot be read"):
        return _data_uri(read())


def _data_uri(data: bytes) -> str:
    """An image as a data URI; empty if it is not a PNG, GIF or SVG."""
    kind = next((kind for start, kind in KINDS.items() if data.startswith(start)), None)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}" if kind else ""


def _look(letter: str) -> dict[str, Any]:
    number = LETTERS.index(letter)
    return {"color": f"C{number % 10}", "linestyle": LINES[number % len(LINES)]}


def _plot(letters: Mapping[str, str], chart: Chart) -> tuple[str, str]:
    """A chart as the data URI of an SVG, and its last values as text."""
    looks = {
        (key, sampler): {
            **_look(letters[key]),
            "marker": MARKERS.get(sampler, "o"),
            "label": f"{f'{letters[key]} {sampler}'.strip()}: {points[-1].value:#.4g}",
        }
        for (key, sampler), points in chart.curves.items()
    }
    figure = Figure((WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    plots.draw(axes, chart, looks)
    axes.legend(fontsize=9, frameon=False, title="last value", title_fontsize=8)
    file = io.BytesIO()
    # Text stored as text is small; a fixed salt makes equal plots byte-identical.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ddpm"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _data_uri(file.getvalue()), ", ".join(look["label"] for look in looks.values())
