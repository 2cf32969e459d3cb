"""What was found of checkpoints, said as JSON, as a table, and as points of MLflow's curves.

Its own room because all must say the same numbers, and none of them asks how those were found.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from ddpm.config import SampleConfig
from ddpm.evaluation.memorisation import METRIC, MIN_HELD_OUT, NearerShare
from ddpm.evaluation.scores import MAX_FID_FEATURES, Score
from ddpm.utils.progress import printable

FORMAT = "ddpm-evaluation/1"
ENOUGH = 10
"""FID of fewer images a feature than that is mostly bias."""
MANY = 2.0
"""Memorisation is remarked on where even the lower end of its interval is so many times what is expected."""
FIXED = "which favours schedules of many steps, whatever the net; --variance measured does not"
VARIANCES = {
    "measured": "one a timestep, as the net errs on training images",
    "learned": "the net's own, pixel by pixel",
    "beta": FIXED,
    "beta_tilde": FIXED,
}
"""What a bound is worth that has such a variance."""
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
    """Those of memorisation last, if it was looked for."""
    nearest: bytes = field(default=b"", repr=False, compare=False)
    """A PNG: those nearest to a training image, beside it. Not in the JSON; empty: they were not looked for."""

    @property
    def name(self) -> str:
        """The sampler and its steps, "ddim-50", and whatever else is not as a config has it by default."""
        words = [f"{self.sample.sampler}-{self.sample.num_sample_steps}"]
        for setting in SETTINGS:
            if (value := getattr(self.sample, setting)) not in (getattr(SampleConfig, setting), "beta_tilde"):
                words += [setting, *map(str, value if isinstance(value, tuple) else (value,))]
        return " ".join(words)


@dataclass(frozen=True)
class CheckpointResult:
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
    variance: str
    """That of p(x_{t-1} | x_t) in the bound; empty for a process without one."""
    variance_is_default: bool
    """Whether nobody asked for another one."""
    bits: tuple[Score, ...]
    """The bound and its terms; none for a process without one."""
    drawn: tuple[Drawn, ...]
    num_classes: int
    """Labels that the net is given, so that bits are of log p(x | y); 0: none, and they are of log p(x)."""


@dataclass(frozen=True)
class Report:
    """What was found of some checkpoints that were judged alike."""

    settings: Mapping[str, Any]
    """All that decides the numbers, but for the checkpoints."""
    verdicts: tuple[CheckpointResult, ...]

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
        verdicts = [dataclasses.asdict(v, dict_factory=_without_pictures) for v in self.verdicts]
        found = {"settings": self.settings, "checkpoints": verdicts}
        return json.dumps(_finite({"format": FORMAT, **found}), indent=2, allow_nan=False) + "\n"


class Row(NamedTuple):
    """One number, and what it is about."""

    score: Score
    verdict: CheckpointResult
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
                *([_name(verdict) if i == 0 else ""] if several else []),
                f"{verdict.images_seen:,}" if i == 0 else "",
                drawn.name,
                *(_cell(score) if score else "" for score in found),
            )
    return made


def _list(report: Report) -> Table:
    (verdict,) = report.verdicts
    (drawn,) = verdict.drawn
    title = f"{_name(verdict)}, {verdict.images_seen:,} images seen, {drawn.name}"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("")
    for title in ("value", "n", "real against real"):
        made.add_column(title, justify="right")
    for score, _, _ in rows(report):
        name = f"  {score.name.partition('-')[2]}" if score.name in TERMS else score.name
        made.add_row(name, _cell(score), _counts(score), _floor(score))
    return made


def nearest_pictures(report: Report, out: str) -> Iterator[tuple[str, CheckpointResult, Drawn]]:
    """The picture of the nearest pairs of each way of drawing, under the name that it has beside the file `out`.

    "digits.json" has "digits-nearest.png", or "digits-nearest-RUN-IMAGES_SEEN-WAY.png" where there are several.
    """
    found = [(verdict, drawn) for verdict in report.verdicts for drawn in verdict.drawn if drawn.nearest]
    folder, slash, name = out.rpartition("/")
    stem = f"{folder}{slash}{PurePosixPath(name).stem}-nearest"
    words = [f"{verdict.run}-{verdict.images_seen}-{drawn.name}" for verdict, drawn in found]
    if len(set(words)) < len(found):  # runs of one name in two places
        words = [f"{word}-{v.weights_sha256[:8]}" for word, (v, _) in zip(words, found, strict=True)]
    for word, pair in zip(words, found, strict=True):
        suffix = "-" + re.sub(r"[^\w.-]+", "-", word) if len(found) > 1 else ""
        yield f"{stem}{suffix}.png", *pair


def remarks(report: Report, out: str) -> list[str]:
    """What one must know to read the numbers.

    Args:
        out: the report's file, which pictures are beside.
    """
    lines = list(_on_variances(report))
    size = report.settings["features"]["size"]
    for name, group in _by_name(report).items():
        least = min(min(row.score.n, row.score.n_real or row.score.n) for row in group)
        features = min(size, MAX_FID_FEATURES) if name.startswith("FID-") else size
        if name.startswith("FID") and least < ENOUGH * features:
            lines.append(
                f"{name}: {least:,} images are few for {features:,} features, and raise it by much of what real images "
                "have against real ones; compare with that, or go by KID, which n does not bias"
            )
    lines += _on_memorisation(report, out)
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


def _on_variances(report: Report) -> Iterator[str]:
    bounded = [verdict for verdict in report.verdicts if verdict.bits]
    for variance in sorted({verdict.variance for verdict in bounded}):
        runs = sorted({verdict.run for verdict in bounded if verdict.variance == variance})
        whose = f" of {', '.join(runs)}" if len({verdict.variance for verdict in bounded}) > 1 else ""
        yield f"bits/dim{whose}: the variance is {variance}, {VARIANCES[variance]}"


def _on_memorisation(report: Report, out: str) -> Iterator[str]:
    found = [score for score, _, _ in rows(report) if isinstance(score, NearerShare)]
    if found and (n := found[0].n_real) < MIN_HELD_OUT:
        yield (
            f"{METRIC}: {n} held-out images are too few for a 1st percentile; the smallest of their distances stands "
            f"for it, and of other images like them {_percent(found[0].floor)} are expected below it"
        )
    for uri, verdict, drawn in nearest_pictures(report, out):
        for s in drawn.scores:
            if isinstance(s, NearerShare) and s.low > MANY * s.floor and verdict.saw_this_data:
                yield (
                    f"{verdict.run}, {verdict.images_seen:,} images seen, {drawn.name}: {_percent(s.value)} (95 % "
                    f"interval {_percent(s.low)} to {_percent(s.high)}) of the images drawn are nearer to a training "
                    f"image, by {s.space}, than {100 - 100 * s.floor:.0f} % of held-out images are: the net repeats "
                    f"training images, or draws typical ones alone; look at {uri}"
                )


def metrics(verdict: CheckpointResult) -> dict[str, float]:
    """Points of curves over images seen: eval/bits_per_dim, eval/KID-lite0, eval/KID-lite0-error, ...

    What was drawn in another way than the run's own is named by that: eval/dpmpp_2m-20/KID-lite0. So is a bound of
    another variance than the default: eval/bits_per_dim-beta_tilde.
    """
    bits_per_dim = "bits_per_dim" if verdict.variance_is_default else f"bits_per_dim-{verdict.variance}"
    values: dict[str, float] = {}
    for score, _, drawn in rows(Report({}, (verdict,))):
        place = "eval" if drawn is None or drawn.is_own else f"eval/{drawn.name}"
        name = f"{place}/{score.name.replace('bits/dim', bits_per_dim)}"
        values |= {name: score.value, f"{name}-error": score.error}
        if isinstance(score, NearerShare):
            values |= {f"{name}-low": score.low, f"{name}-high": score.high}
        if score.floor is not None:
            values[f"{name}-floor"] = score.floor
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _by_name(report: Report) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows(report):
        groups.setdefault(row.score.name, []).append(row)
    return groups


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cell(score: Score) -> str:
    if isinstance(score, NearerShare):
        return f"{score.value:.4f} [{score.low:.4f}, {score.high:.4f}]"
    return _estimate(score.value, score.error)


def _name(verdict: CheckpointResult) -> str:
    """The run's name for a table: what a checkpoint says there is no markup of Rich's, and commands no terminal."""
    return escape(printable(verdict.run))


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


def _without_pictures(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if not isinstance(value, bytes)}


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
