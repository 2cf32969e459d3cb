"""What was found of checkpoints, said four times: as JSON, as a table, as a picture, and as points of MLflow's curves.

Its own room because all four must say the same numbers, and none of them asks how those were found.
"""

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from ddpm.config import SampleConfig
from ddpm.evaluation.metrics import Manifold
from ddpm.evaluation.scores import Score

FORMAT = "ddpm-evaluation/1"
PANEL_WIDTH, PANEL_HEIGHT = 3.6, 3.0
"""Inches."""
ENOUGH = 10
"""FID of fewer images a feature than that is mostly bias."""
PANELS: tuple[tuple[str, ...], ...] = (
    ("bits/dim",),
    ("FID",),
    ("KID",),
    Manifold._fields[:2],
    Manifold._fields[2:],
)
"""Of a picture: the metrics that share one."""
STYLES = ("-", "--")
SETTINGS = ("spacing", "eta", "dynamic_threshold", "guidance_scale", "guidance_interval", "mean", "variance")
"""Of a sampler, beside its steps."""


@dataclass(frozen=True)
class Drawn:
    """What images are worth that were drawn in one way."""

    sample: SampleConfig
    """With its sampler and its number of steps."""
    is_own: bool
    """As the run itself draws."""
    scores: tuple[Score, ...]

    @property
    def name(self) -> str:
        """The sampler and its steps, "ddim-50", and whatever else is not as a config has it by default."""
        words = [f"{self.sample.sampler}-{self.sample.num_sample_steps}"]
        for setting in SETTINGS:
            if (value := getattr(self.sample, setting)) != getattr(SampleConfig, setting):
                words += [setting, *map(str, value if isinstance(value, tuple) else (value,))]
        return " ".join(words)


@dataclass(frozen=True)
class Verdict:
    """What was found of one checkpoint."""

    checkpoint: str
    """Folder or URI."""
    weights_sha256: str
    """Of its averaged weights."""
    run_name: str | None
    run_key: str
    experiment: str
    images_seen: int
    saw_this_data: bool
    """Whether it was trained on the data set whose held-out images it is judged by."""
    bits: tuple[Score, ...]
    """The bound and its terms; none for a process without one."""
    drawn: tuple[Drawn, ...]

    @property
    def name(self) -> str:
        return self.run_name or self.checkpoint


@dataclass(frozen=True)
class Report:
    """What was found of some checkpoints that were judged alike."""

    settings: Mapping[str, Any]
    """All that decides the numbers, but for the checkpoints."""
    verdicts: tuple[Verdict, ...]

    @property
    def key(self) -> str:
        """The same for the same checkpoints judged in the same way; it sorts by the newest of them."""
        what = [
            self.settings,
            *((v.weights_sha256, v.images_seen, *(d.sample for d in v.drawn)) for v in self.verdicts),
        ]
        digest = hashlib.sha256(repr(what).encode()).hexdigest()
        return f"{max(v.images_seen for v in self.verdicts):012d}-{digest[:8]}"

    def of_run(self, run_key: str) -> "Report":
        """What is about this run."""
        return Report(self.settings, tuple(v for v in self.verdicts if v.run_key == run_key))

    def to_json(self) -> str:
        """Every number with its n, its uncertainty and its floor; null stands for what is not finite."""
        return (
            json.dumps(_finite({"format": FORMAT, **dataclasses.asdict(self)}), indent=2, allow_nan=False)
            + "\n"
        )


class Row(NamedTuple):
    """One number, and what it is about."""

    score: Score
    verdict: Verdict
    drawn: Drawn | None
    """None: no image was drawn for it."""


def rows(report: Report) -> Iterator[Row]:
    """Every number, in the order of checkpoints and ways of drawing."""
    for verdict in report.verdicts:
        yield from (Row(score, verdict, None) for score in verdict.bits)
        for drawn in verdict.drawn:
            yield from (Row(score, verdict, drawn) for score in drawn.scores)


def table(report: Report) -> Table:
    """What is to be compared stands below each other: number by number, each of all checkpoints."""
    runs = {verdict.name for verdict in report.verdicts}
    made = Table(header_style="bold", pad_edge=False)
    made.add_column("number", no_wrap=True)
    if len(runs) > 1:
        made.add_column("run", overflow="fold")
    for title in ("images seen", "sampler", "value", "n", "real against real"):
        made.add_column(title, justify="left" if title == "sampler" else "right", no_wrap=True)
    for name, group in _by_name(report).items():
        for i, row in enumerate(group):
            score, verdict, drawn = row
            made.add_row(
                name if i == 0 else "",
                *([verdict.name] if len(runs) > 1 else []),
                f"{verdict.images_seen:,}",
                drawn.name if drawn else "",
                _estimate(score.value, score.error),
                _counts(score.n, score.n_real),
                _floor(score),
                end_section=i == len(group) - 1,
            )
    return made


def remarks(report: Report) -> list[str]:
    """What one must know to read the numbers."""
    lines = []
    size = report.settings["features"]["size"]
    for name, group in _by_name(report).items():
        least = min(min(row.score.n, row.score.n_real or row.score.n) for row in group)
        features = min(size, 128) if name.startswith("FID-") else size
        if name.startswith("FID") and least < ENOUGH * features:
            lines.append(
                f"{name}: {least:,} images are few for {features:,} features, and raise it by much of what real images "
                "have against real ones; compare with that, or go by KID, which n does not bias"
            )
    others = {verdict.name for verdict in report.verdicts if not verdict.saw_this_data}
    if others:
        lines.append(
            f"trained on other data than these held-out images belong to: {', '.join(sorted(others))}"
        )
    return lines


def metrics(verdict: Verdict) -> dict[str, float]:
    """Points of curves over images seen: eval/bits_per_dim, eval/KID-lite0, eval/KID-lite0-error, ...

    What was drawn in another way than the run's own is named by that: eval/dpmpp_2m-20/KID-lite0.
    """
    values = {}
    for score, _, drawn in rows(Report({}, (verdict,))):
        place = "eval" if drawn is None or drawn.is_own else f"eval/{drawn.name}"
        name = f"{place}/{score.name.replace('bits/dim', 'bits_per_dim')}"
        values |= {name: score.value, f"{name}-error": score.error}
        if score.floor is not None:
            values[f"{name}-floor"] = score.floor
    return {name: value for name, value in values.items() if math.isfinite(value)}


def picture(report: Report) -> bytes:
    """Quality over images seen, and over the number of sampling steps, where there are several; a PNG."""
    found = (_over_images_seen(report), _over_sample_steps(report))
    lines = [
        curves
        for curves in found
        if any(len({x for x, _ in points}) > 1 for points in curves.points.values())
    ]
    lines = lines or [found[0]]
    scores = [row.score for row in rows(report)]
    panels = [panel for panel in PANELS if any(_is_of(panel, score) for score in scores)]
    figure = Figure((PANEL_WIDTH * len(panels), PANEL_HEIGHT * len(lines) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for curves, line in zip(lines, figure.subplots(len(lines), len(panels), squeeze=False), strict=True):
        for panel, axes in zip(panels, line, strict=True):
            _draw(axes, panel, curves)
    n = max(score.n for score in scores)
    figure.suptitle(
        f"{n:,} images; bars: one standard error; grey: real images against real ones", fontsize=9
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


class _Curves(NamedTuple):
    """What a line of panels shows."""

    x_label: str
    is_log: bool
    points: dict[str, list[tuple[int, Score]]]
    """By what the legend says: x, and all scores there."""


def _over_images_seen(report: Report) -> _Curves:
    several = len({verdict.name for verdict in report.verdicts}) > 1
    points: dict[str, list[tuple[int, Score]]] = {}
    for score, verdict, drawn in rows(report):
        label = " ".join([*([verdict.name] if several else []), *([drawn.name] if drawn else [])])
        points.setdefault(label, []).append((verdict.images_seen, score))
    return _Curves("images seen", False, points)


def _over_sample_steps(report: Report) -> _Curves:
    several = len({verdict.name for verdict in report.verdicts}) > 1
    points: dict[str, list[tuple[int, Score]]] = {}
    for score, verdict, drawn in rows(report):
        if drawn is not None:
            who = [verdict.name] if several else []
            label = " ".join([*who, f"{verdict.images_seen:,}", drawn.sample.sampler])
            points.setdefault(label, []).append((drawn.sample.num_sample_steps or 0, score))
    return _Curves("sampling steps", True, points)


def _draw(axes: Axes, panel: tuple[str, ...], curves: _Curves) -> None:
    shown = {
        (label, name): sorted(
            ((x, score) for x, score in points if _is_of((name,), score)), key=lambda point: point[0]
        )
        for label, points in curves.points.items()
        for name in panel
    }
    shown = {key: points for key, points in shown.items() if points}
    if not shown:
        axes.set_axis_off()
        return
    colours = {label: f"C{i % 10}" for i, label in enumerate(dict.fromkeys(label for label, _ in shown))}
    for (label, name), points in shown.items():
        x, scores = zip(*points, strict=True)
        axes.errorbar(
            x,
            [score.value for score in scores],
            [score.error for score in scores],
            label=" ".join([label, *([name] if len(panel) > 1 else [])]),
            color=colours[label],
            linestyle=STYLES[panel.index(name)],
            marker=".",
            capsize=2,
            linewidth=1,
        )
    for name in panel:
        score = next(points[0][1] for (_, of), points in shown.items() if of == name)
        if score.floor is not None and score.floor_error is not None:
            low, high = score.floor - score.floor_error, score.floor + score.floor_error
            axes.axhspan(low, high, color="0.9", linewidth=0)
            axes.axhline(score.floor, color="0.6", linewidth=1, linestyle=STYLES[panel.index(name)])
    names = dict.fromkeys(score.name for points in shown.values() for _, score in points)
    axes.set_title(", ".join(names), fontsize=9)
    axes.set_xlabel(curves.x_label, fontsize=8)
    axes.tick_params(labelsize=7)
    if curves.is_log:
        ticks = sorted({x for points in shown.values() for x, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(x) for x in ticks], minor=False)
        axes.set_xticks([], minor=True)
    if len(shown) > 1 or "" not in curves.points:
        axes.legend(fontsize=6)


def _is_of(panel: tuple[str, ...], score: Score) -> bool:
    """Whether the score is one of the panel's metrics; the terms of the bound are in none."""
    return score.name in panel or (score.n_real is not None and score.name.partition("-")[0] in panel)


def _by_name(report: Report) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows(report):
        groups.setdefault(row.score.name, []).append(row)
    return groups


def _estimate(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}"


def _counts(n: int, n_real: int | None) -> str:
    return f"{n:,}" if n_real is None else f"{n:,} / {n_real:,}"


def _floor(score: Score) -> str:
    """With its own n, where that is smaller."""
    if score.floor is None or score.floor_error is None:
        return ""
    fewer = f" (n {score.floor_n:,})" if score.floor_n != score.n else ""
    return _estimate(score.floor, score.floor_error) + fewer


def _finite(value: Any) -> Any:
    """JSON has no name for what is not."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value
