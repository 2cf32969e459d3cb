"""The comparison of runs as one HTML file that needs no network: the answer, samples, settings, ranks, and curves.

Names, settings and images are untrusted: everything is escaped, plots show letters instead of names, images are data
URIs, and the content security policy allows only the page's own script.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ddpm.config.json import keys_that_affect
from ddpm.config.tree import Affects, Config
from ddpm.evaluation import comparison, plots
from ddpm.evaluation.compared_run import ComparedRun
from ddpm.evaluation.comparison import LETTERS, Ranking, Results
from ddpm.evaluation.plots import Chart, charts_of
from ddpm.utils.retry import as_user_error
from ddpm.utils.tables import estimate

LOSSES = ("train/loss", "held_out/loss")
MAX_GRIDS = 12
"""Largest number of slider positions."""
LINES = ["-", "--", "-.", ":"]
WIDTH = 5.2
HEIGHT = 3.0
"""Inches of a plot."""
PX = 96
"""CSS pixels per inch."""
KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"<?xml": "image/svg+xml"}


def render(runs: Sequence[ComparedRun], rankings: Sequence[Ranking] | None = None) -> bytes:
    """The page.

    Args:
        runs: at most 20.
        rankings: those of a search; None: computed from the runs' evaluations.
    """
    found = comparison.compare(runs, rankings)
    letters = found.letters
    differing = differences(runs) if any(run.settings for run in runs) else None
    positions = shared_positions(runs)
    environment = Environment(
        loader=PackageLoader("ddpm.evaluation"), autoescape=True, undefined=StrictUndefined
    )
    environment.globals["estimate"] = estimate
    script = environment.get_template("comparison.js").render()
    page = environment.get_template("comparison.html").render(
        title=f"Comparison of {', '.join(run.name for run in runs)}",
        runs=runs,
        letters=letters,
        colours={key: to_hex(_look(letter)["color"]) for key, letter in letters.items()},
        names=found.names,
        has_several_data=len({run.data for run in runs if run.data}) > 1,
        verdicts=found.verdicts,
        remark=found.remark,
        steps=found.steps,
        positions=positions,
        grids={run.key: _grids(run, positions) for run in runs},
        facts=list(dict.fromkeys(title for run in runs for title in run.facts)),
        differing=differing,
        rankings=found.rankings,
        curves=charts(runs, found.results),
        plot=partial(_plot, letters),
        plot_size=(round(WIDTH * PX), round(HEIGHT * PX)),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page.encode(errors="replace")


def differences(runs: Sequence[ComparedRun]) -> dict[str, list[str | None]]:
    """Settings whose values differ, with the value of each run; None: the run has no such setting."""
    known = [run.settings for run in runs if run.settings]
    locations = keys_that_affect(Config(), Affects.LOCATION)
    return {
        key: [run.settings.get(key) for run in runs]
        for key in dict.fromkeys(chain(*known))
        if key not in locations and len({settings.get(key) for settings in known}) > 1
    }


def shared_positions(runs: Sequence[ComparedRun]) -> list[int]:
    """Positions of grids, of any run, ascending: at most MAX_GRIDS, evenly chosen, with the last one."""
    at = sorted({position for run in runs for position in run.grids})
    if len(at) <= MAX_GRIDS:
        return at
    return [at[round((i + 1) * len(at) / MAX_GRIDS) - 1] for i in range(MAX_GRIDS)]


def charts(runs: Sequence[ComparedRun], results: Results) -> list[Chart]:
    """Curves over images seen; labels are run keys."""
    logged: dict[str, Chart] = {}
    for run in runs:
        for name, points in run.curves.items():
            chart = logged.setdefault(name, Chart(name, {}, is_log_y=name in LOSSES))
            chart.curves[run.key] = list(points)
    scored = (
        (run.key, at, score)
        for run in runs
        for at, result in sorted(results.get(run.key, {}).items())
        for score in comparison.ranked_scores(result)
    )
    return [*logged.values(), *charts_of(scored)]


def _grids(run: ComparedRun, positions: Sequence[int]) -> dict[int, str]:
    """A run's grids, the newest one at each position."""
    newest = [max((p for p in run.grids if p <= at), default=None) for at in positions]
    grids = {}
    for at in newest:
        if at is not None and at not in grids:
            with as_user_error(f"an image of {run.where} cannot be read"):
                grids[at] = _data_uri(run.grids[at]())
    return grids


def _data_uri(data: bytes) -> str:
    """An image as a data URI; empty if it is not a PNG or an SVG."""
    kind = next((kind for start, kind in KINDS.items() if data.startswith(start)), None)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}" if kind else ""


def _look(letter: str) -> dict[str, Any]:
    number = LETTERS.index(letter)
    return {"color": f"C{number % 10}", "linestyle": LINES[number % len(LINES)]}


def _plot(letters: Mapping[str, str], chart: Chart) -> tuple[str, str]:
    """A chart as the data URI of an SVG, and its last values as text."""
    looks = {}
    for key, points in chart.curves.items():
        letter = letters[key]
        looks[key] = {**_look(letter), "label": f"{letter}: {points[-1].value:#.4g}"}
    figure = Figure((WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    plots.draw_chart(axes, chart, looks)
    axes.legend(fontsize=9, frameon=False, title="last value", title_fontsize=8)
    file = io.BytesIO()
    # Text stored as text is small; a fixed salt makes equal plots byte-identical.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ddpm"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _data_uri(file.getvalue()), ", ".join(look["label"] for look in looks.values())
