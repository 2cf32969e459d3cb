"""What was found of checkpoints, said as JSON, as a table, and as points of MLflow's curves.

Its own room because all must say the same numbers, and none of them asks how those were found.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group
from rich.table import Table

from ddpm.config import SampleConfig
from ddpm.evaluation.scores import MAX_FID_FEATURES, Score

FORMAT = "ddpm-evaluation/1"
ENOUGH = 10
"""FID of fewer images a feature than that is mostly bias."""
TERMS = ("bits/dim-prior", "bits/dim-kl", "bits/dim-decoder")
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
    run: str
    run_key: str
    """Empty: no run of ours."""
    experiment: str
    images_seen: int
    saw_this_data: bool
    """Whether it was trained on the data set whose held-out images it is judged by."""
    bits: tuple[Score, ...]
    """The bound and its terms; none for a process without one."""
    drawn: tuple[Drawn, ...]
    num_classes: int
    """Of the labels that the net is given, so that bits are of log p(x | y); 0: none, and they are of log p(x)."""


@dataclass(frozen=True)
class Report:
    """What was found of some checkpoints that were judged alike."""

    settings: Mapping[str, Any]
    """All that decides the numbers, but for the checkpoints."""
    verdicts: tuple[Verdict, ...]

    @property
    def key(self) -> str:
        """The same for the same checkpoints judged in the same way; it sorts by the newest of them."""
        what = [(v.weights_sha256, v.images_seen, [d.sample for d in v.drawn]) for v in self.verdicts]
        digest = hashlib.sha256(repr((self.settings, what)).encode()).hexdigest()
        return f"{max(v.images_seen for v in self.verdicts):012d}-{digest[:8]}"

    def of_run(self, run_key: str) -> "Report":
        """What is about this run."""
        return Report(self.settings, tuple(v for v in self.verdicts if v.run_key == run_key))

    def to_json(self) -> str:
        """Every number with its n, its uncertainty and its floor; null stands for what is not finite."""
        found = {"settings": self.settings, "checkpoints": [dataclasses.asdict(v) for v in self.verdicts]}
        return json.dumps(_finite({"format": FORMAT, **found}), indent=2, allow_nan=False) + "\n"


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


def tables(report: Report, width: int) -> Group:
    """Of one checkpoint and one way of drawing, number by number; of several, a line each, and real images last.

    Args:
        width: of the terminal; where the numbers do not fit side by side, there are several tables.
    """
    if sum(len(verdict.drawn) for verdict in report.verdicts) == 1:
        return Group(_list(report))
    names = [name for name in _by_name(report) if name not in TERMS]
    console, made = Console(width=1000), []
    for at_once in range(len(names), 0, -1):
        made = [_comparison(report, names[i : i + at_once]) for i in range(0, len(names), at_once)]
        if all(console.measure(table).maximum <= width for table in made):
            break
    return Group(*made)


def _comparison(report: Report, names: Sequence[str]) -> Table:
    several = len({verdict.run for verdict in report.verdicts}) > 1
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    if several:
        made.add_column("run", no_wrap=True)
    made.add_column("images seen", justify="right", no_wrap=True)
    made.add_column("sampler", "real against real", no_wrap=True)
    for name in names:
        score, title = _by_name(report)[name][0].score, name.replace("-", "-\n", 1)
        made.add_column(f"{title}\nn {_counts(score)}", _floor(score), justify="right", no_wrap=True)
    for verdict in report.verdicts:
        for i, drawn in enumerate(verdict.drawn):
            scores = {score.name: score for score in (*(verdict.bits if i == 0 else ()), *drawn.scores)}
            found = [scores.get(name) for name in names]
            made.add_row(
                *([verdict.run if i == 0 else ""] if several else []),
                f"{verdict.images_seen:,}" if i == 0 else "",
                drawn.name,
                *(_estimate(score.value, score.error) if score else "" for score in found),
            )
    return made


def _list(report: Report) -> Table:
    (verdict,) = report.verdicts
    (drawn,) = verdict.drawn
    title = f"{verdict.run}, {verdict.images_seen:,} images seen, {drawn.name}"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("")
    for title in ("value", "n", "real against real"):
        made.add_column(title, justify="right")
    for score, _, _ in rows(report):
        name = f"  {score.name.partition('-')[2]}" if score.name in TERMS else score.name
        made.add_row(name, _estimate(score.value, score.error), _counts(score), _floor(score))
    return made


def remarks(report: Report) -> list[str]:
    """What one must know to read the numbers."""
    lines = []
    size = report.settings["features"]["size"]
    for name, group in _by_name(report).items():
        least = min(min(row.score.n, row.score.n_real or row.score.n) for row in group)
        features = min(size, MAX_FID_FEATURES) if name.startswith("FID-") else size
        if name.startswith("FID") and least < ENOUGH * features:
            lines.append(
                f"{name}: {least:,} images are few for {features:,} features, and raise it by much of what real images "
                "have against real ones; compare with that, or go by KID, which n does not bias"
            )
    others = {verdict.run for verdict in report.verdicts if not verdict.saw_this_data}
    if others:
        lines.append(
            f"trained on other data than these held-out images belong to: {', '.join(sorted(others))}"
        )
    return lines + _remarks_on_bits(report)


def _remarks_on_bits(report: Report) -> list[str]:
    """What keeps bits/dim of these checkpoints, or of other data, from being compared."""
    judged = [verdict for verdict in report.verdicts if verdict.bits]
    if not judged:
        return []
    lines = []
    conditional = {verdict.run for verdict in judged if verdict.num_classes}
    if conditional and not all(verdict.num_classes for verdict in judged):
        # p(x) >= p(x | y) p(y), with p(y) = 1 / num_classes.
        classes = max(verdict.num_classes for verdict in judged)
        lines.append(
            f"bits/dim: nets that are given the label ({', '.join(sorted(conditional))}) bound log p(x | y), the "
            f"others log p(x); with log2({classes}) = {math.log2(classes):.2f} bits an image added they bound "
            "log p(x) too"
        )
    levels = report.settings["data"]["grey_levels"]
    if levels < 256:
        lines.append(
            f"bits/dim: the held-out images have {levels} grey levels, not 256, and a uniform code over these costs "
            f"log2({levels}) = {math.log2(levels):.2f}; do not compare with bits/dim of other data"
        )
    return lines


def metrics(verdict: Verdict) -> dict[str, float]:
    """Points of curves over images seen: eval/bits_per_dim, eval/KID-lite0, eval/KID-lite0-error, ...

    What was drawn in another way than the run's own is named by that: eval/dpmpp_2m-20/KID-lite0.
    """
    values: dict[str, float] = {}
    for score, _, drawn in rows(Report({}, (verdict,))):
        place = "eval" if drawn is None or drawn.is_own else f"eval/{drawn.name}"
        name = f"{place}/{score.name.replace('bits/dim', 'bits_per_dim')}"
        values |= {name: score.value, f"{name}-error": score.error}
        if score.floor is not None:
            values[f"{name}-floor"] = score.floor
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _by_name(report: Report) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows(report):
        groups.setdefault(row.score.name, []).append(row)
    return groups


def _estimate(value: float, error: float) -> str:
    is_tiny = 0 < abs(value) < 5e-5
    return f"{value:.0e} ± {error:.0e}" if is_tiny else f"{value:.4f} ± {error:.4f}"


def _counts(score: Score) -> str:
    return f"{score.n:,}" if score.n_real is None else f"{score.n:,} / {score.n_real:,}"


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
