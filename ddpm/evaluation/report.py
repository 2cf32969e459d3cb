"""Results of an evaluation, as JSON, as a table, and as points of MLflow's curves."""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from ddpm.config import SampleConfig
from ddpm.evaluation.memorisation import METRIC, MIN_HELD_OUT, NearerShare
from ddpm.evaluation.scores import MAX_FID_FEATURES, Score
from ddpm.utils import strict_json
from ddpm.utils.progress import printable

FORMAT = "ddpm-evaluation/1"
ENOUGH = 10
"""With fewer images per feature than this, FID is mostly bias."""
MANY = 2.0
"""Memorisation is reported if the lower end of its interval is this many times the expected share."""
FIXED = "which favours schedules of many steps, for any net; --variance measured does not"
VARIANCES = {
    "measured": "one per timestep, from the net's errors on training images",
    "learned": "the net's own, pixel by pixel",
    "beta": FIXED,
    "beta_tilde": FIXED,
}
"""Remark about a bound with each variance."""
TERMS = ("bits/dim-prior", "bits/dim-kl", "bits/dim-decoder")
SETTINGS = ("spacing", "eta", "dynamic_threshold", "guidance_scale", "guidance_interval", "mean", "variance")
"""Settings of a sampler, beside its steps."""


@dataclass(frozen=True)
class Drawn:
    """Scores of the images that were sampled in one way."""

    sample: SampleConfig
    """Settings, with sampler and number of steps filled in."""
    is_own: bool
    """Whether these are the run's own settings."""
    scores: tuple[NearerShare | Score, ...]
    """Scores; those of memorisation, if any, are last."""
    nearest: bytes = field(default=b"", repr=False, compare=False)
    """A PNG of the images nearest to a training image, beside it. Not in the JSON; empty: there was no search."""

    @property
    def name(self) -> str:
        """The sampler and its steps, such as "ddim-50", and all settings that are not defaults."""
        words = [f"{self.sample.sampler}-{self.sample.num_sample_steps}"]
        for setting in SETTINGS:
            if (value := getattr(self.sample, setting)) not in (getattr(SampleConfig, setting), "beta_tilde"):
                words += [setting, *map(str, value if isinstance(value, tuple) else (value,))]
        return " ".join(words)


@dataclass(frozen=True)
class CheckpointResult:
    """Results of one checkpoint."""

    checkpoint: str
    """Folder or URI."""
    weights_sha256: str
    """SHA-256 of its averaged weights."""
    run: str
    run_key: str
    """Empty: imported, without a run."""
    experiment: str
    images_seen: int
    saw_this_data: bool
    """Whether it was trained on the data set of these held-out images."""
    variance: str
    """Variance of p(x_{t-1} | x_t) in the bound; empty for a process without a bound."""
    variance_is_default: bool
    """Whether the variance was not given."""
    bits: tuple[Score, ...]
    """The bound and its terms; empty for a process without a bound."""
    drawn: tuple[Drawn, ...]
    num_classes: int
    """Classes of a conditional net, whose bits are of log p(x | y); 0: unconditional, bits are of log p(x)."""


@dataclass(frozen=True)
class Report:
    """Results of some checkpoints that were evaluated alike."""

    settings: Mapping[str, Any]
    """Everything that determines the results, except for the checkpoints."""
    results: tuple[CheckpointResult, ...]

    @property
    def key(self) -> str:
        """A name that is equal for equal checkpoints and settings; it sorts by the newest checkpoint."""
        what = [(v.weights_sha256, v.images_seen, [d.sample for d in v.drawn]) for v in self.results]
        digest = hashlib.sha256(repr((self.settings, what)).encode()).hexdigest()
        return f"{max(v.images_seen for v in self.results):012d}-{digest[:8]}"

    def of_run(self, run_key: str) -> "Report":
        """The results of one run."""
        return Report(self.settings, tuple(v for v in self.results if v.run_key == run_key))

    def to_json(self) -> str:
        """All scores with n, uncertainty and floor; null stands for a number that is not finite."""
        results = [dataclasses.asdict(v, dict_factory=_without_pictures) for v in self.results]
        found = {"settings": self.settings, "checkpoints": results}
        return json.dumps(_finite({"format": FORMAT, **found}), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Report":
        """The report that `to_json` wrote, without pictures, and without scores that are not finite.

        Raises:
            UserError: it is something else, or damaged; `where` names it.
        """
        with contextlib.suppress(ValueError, RecursionError):  # of which parse says more
            text = json.dumps(json.loads(text, object_hook=_finite_scores))
        where = f"{where} is not a result of jobs/evaluate.py"
        found = strict_json.parse(_Saved, text, where, extra="ignore")
        return cls(found.settings, found.checkpoints)


@dataclass(frozen=True)
class _Saved:
    """What is read of a report's JSON."""

    format: Literal["ddpm-evaluation/1"]
    settings: dict[str, Any]
    checkpoints: tuple[CheckpointResult, ...]


class Row(NamedTuple):
    """One score, with its checkpoint and way of sampling."""

    score: Score
    result: CheckpointResult
    drawn: Drawn | None
    """None: a score without sampled images."""


def rows(report: Report) -> Iterator[Row]:
    """All scores, in the order of checkpoints and ways of sampling."""
    for result in report.results:
        yield from (Row(score, result, None) for score in result.bits)
        for drawn in result.drawn:
            yield from (Row(score, result, drawn) for score in drawn.scores)


def tables(report: Report, width: int) -> Group:
    """A list of scores for one checkpoint and one way of sampling; else a line for each, with real images last.

    Args:
        width: width of the terminal; if the columns do not fit, there are several tables.
    """
    if sum(len(result.drawn) for result in report.results) == 1:
        return Group(_list(report))
    names = [name for name in _by_name(report) if name not in TERMS]
    console, made = Console(width=1000), []
    for at_once in range(len(names), 0, -1):
        made = [_comparison(report, names[i : i + at_once]) for i in range(0, len(names), at_once)]
        if all(console.measure(table).maximum <= width for table in made):
            break
    return Group(*made)


def _comparison(report: Report, names: Sequence[str]) -> Table:
    several = len({result.run for result in report.results}) > 1
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    if several:
        made.add_column("run", no_wrap=True)
    made.add_column("images seen", justify="right", no_wrap=True)
    made.add_column("sampler", "real against real", no_wrap=True)
    for name in names:
        score, title = _by_name(report)[name][0].score, name.replace("-", "-\n", 1)
        made.add_column(f"{title}\nn {_counts(score)}", _floor(score), justify="right", no_wrap=True)
    for result in report.results:
        for i, drawn in enumerate(result.drawn):
            scores = {score.name: score for score in (*(result.bits if i == 0 else ()), *drawn.scores)}
            found = [scores.get(name) for name in names]
            made.add_row(
                *([_name(result) if i == 0 else ""] if several else []),
                f"{result.images_seen:,}" if i == 0 else "",
                drawn.name,
                *(_cell(score) if score else "" for score in found),
            )
    return made


def _list(report: Report) -> Table:
    (result,) = report.results
    (drawn,) = result.drawn
    title = f"{_name(result)}, {result.images_seen:,} images seen, {drawn.name}"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("")
    for title in ("value", "n", "real against real"):
        made.add_column(title, justify="right")
    for score, _, _ in rows(report):
        name = f"  {score.name.partition('-')[2]}" if score.name in TERMS else score.name
        made.add_row(name, _cell(score), _counts(score), _floor(score))
    return made


def nearest_pictures(report: Report, out: str) -> Iterator[tuple[str, CheckpointResult, Drawn]]:
    """The pictures of the nearest pairs of all ways of sampling, with their names beside the file `out`.

    "digits.json" has "digits-nearest.png", or "digits-nearest-RUN-IMAGES_SEEN-WAY.png" where there are several.
    """
    found = [(result, drawn) for result in report.results for drawn in result.drawn if drawn.nearest]
    folder, slash, name = out.rpartition("/")
    stem = f"{folder}{slash}{PurePosixPath(name).stem}-nearest"
    words = [f"{result.run}-{result.images_seen}-{drawn.name}" for result, drawn in found]
    if len(set(words)) < len(found):  # runs of one name in two places
        words = [f"{word}-{v.weights_sha256[:8]}" for word, (v, _) in zip(words, found, strict=True)]
    for word, pair in zip(words, found, strict=True):
        suffix = "-" + re.sub(r"[^\w.-]+", "-", word) if len(found) > 1 else ""
        yield f"{stem}{suffix}.png", *pair


def remarks(report: Report, out: str) -> list[str]:
    """Remarks for reading the scores.

    Args:
        out: the report's file; pictures are beside it.
    """
    lines = list(_on_variances(report))
    size = report.settings["features"]["size"]
    for name, group in _by_name(report).items():
        least = min(min(row.score.n, row.score.n_real or row.score.n) for row in group)
        features = min(size, MAX_FID_FEATURES) if name.startswith("FID-") else size
        if name.startswith("FID") and least < ENOUGH * features:
            lines.append(
                f"{name}: {least:,} images are few for {features:,} features, which raises it by about the value of "
                "real images against real ones; compare with that value, or use KID, which n does not bias"
            )
    lines += _on_memorisation(report, out)
    others = {result.run for result in report.results if not result.saw_this_data}
    if others:
        lines.append(f"trained on other data than the held-out images' data set: {', '.join(sorted(others))}")
    return lines + _remarks_on_bits(report)


def _remarks_on_bits(report: Report) -> list[str]:
    """Reasons why bits/dim of these checkpoints, or of other data, are not comparable."""
    judged = [result for result in report.results if result.bits]
    if not judged:
        return []
    lines = []
    conditional = {result.run for result in judged if result.num_classes}
    if conditional and not all(result.num_classes for result in judged):
        # p(x) >= p(x | y) p(y), with p(y) = 1 / num_classes.
        classes = max(result.num_classes for result in judged)
        lines.append(
            f"bits/dim: nets with labels ({', '.join(sorted(conditional))}) bound log p(x | y), the others log p(x); "
            f"add log2({classes}) = {math.log2(classes):.2f} bits per image to bound log p(x) with labels, too"
        )
    levels = report.settings["data"]["grey_levels"]
    if levels < 256:
        lines.append(
            f"bits/dim: the held-out images have {levels} grey levels, not 256; a uniform code for these costs "
            f"log2({levels}) = {math.log2(levels):.2f}; do not compare with bits/dim of other data"
        )
    return lines


def _on_variances(report: Report) -> Iterator[str]:
    bounded = [result for result in report.results if result.bits]
    for variance in sorted({result.variance for result in bounded}):
        runs = sorted({result.run for result in bounded if result.variance == variance})
        whose = f" of {', '.join(runs)}" if len({result.variance for result in bounded}) > 1 else ""
        yield f"bits/dim{whose}: the variance is {variance}, {VARIANCES[variance]}"


def _on_memorisation(report: Report, out: str) -> Iterator[str]:
    found = [score for score, _, _ in rows(report) if isinstance(score, NearerShare)]
    if found and (n := found[0].n_real) < MIN_HELD_OUT:
        yield (
            f"{METRIC}: {n} held-out images are too few for a 1st percentile; the smallest of their distances is used "
            f"instead, below which {_percent(found[0].floor)} of other held-out images are expected"
        )
    for uri, result, drawn in nearest_pictures(report, out):
        for s in drawn.scores:
            if isinstance(s, NearerShare) and s.low > MANY * s.floor and result.saw_this_data:
                yield (
                    f"{result.run}, {result.images_seen:,} images seen, {drawn.name}: {_percent(s.value)} (95 % "
                    f"interval {_percent(s.low)} to {_percent(s.high)}) of the generated images are nearer to a "
                    f"training image, by {s.space}, than {100 - 100 * s.floor:.0f} % of held-out images are: the net "
                    f"repeats training images, or makes only typical ones; look at {uri}"
                )


def metrics(result: CheckpointResult) -> dict[str, float]:
    """Points of curves over images seen: eval/bits_per_dim, eval/KID-lite0, ...

    MLflow groups metrics by the first part of their name: errors are eval_error/KID-lite0, ..., values of real images
    against real ones eval_floor/KID-lite0, ..., intervals eval_low/..., eval_high/.... Another way of sampling than
    the run's own is part of the name: eval/dpmpp_2m-20/KID-lite0. So is another variance than the default:
    eval/bits_per_dim-beta_tilde.
    """
    bits_per_dim = "bits_per_dim" if result.variance_is_default else f"bits_per_dim-{result.variance}"
    values: dict[str, float] = {}
    for score, _, drawn in rows(Report({}, (result,))):
        way = "" if drawn is None or drawn.is_own else f"{drawn.name}/"
        name = f"{way}{score.name.replace('bits/dim', bits_per_dim)}"
        values |= {f"eval/{name}": score.value, f"eval_error/{name}": score.error}
        if isinstance(score, NearerShare):
            values |= {f"eval_low/{name}": score.low, f"eval_high/{name}": score.high}
        if score.floor is not None:
            values[f"eval_floor/{name}"] = score.floor
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


def _name(result: CheckpointResult) -> str:
    """The run's name for a table, without Rich's markup or control characters, since it comes from a checkpoint."""
    return escape(printable(result.run))


def _estimate(value: float, error: float) -> str:
    is_tiny = 0 < abs(value) < 5e-5
    return f"{value:.0e} ± {error:.0e}" if is_tiny else f"{value:.4f} ± {error:.4f}"


def _counts(score: Score) -> str:
    return f"{score.n:,}" if score.n_real is None else f"{score.n:,} / {score.n_real:,}"


def _floor(score: Score) -> str:
    """The floor, with its own n if that is smaller."""
    if score.floor is None or score.floor_error is None:
        return ""
    fewer = f" (n {score.floor_n:,})" if score.floor_n != score.n else ""
    return _estimate(score.floor, score.floor_error) + fewer


def _without_pictures(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if not isinstance(value, bytes)}


def _finite_scores(items: dict[str, Any]) -> dict[str, Any]:
    """An object of the JSON, without scores for which `_finite` wrote null."""
    for key in {"bits", "scores"} & set(items):
        if isinstance(items[key], list):
            is_null = [
                isinstance(s, dict) and None in (s.get("value", 0), s.get("error", 0)) for s in items[key]
            ]
            items[key] = [s for s, null in zip(items[key], is_null, strict=True) if not null]
    return items


def _finite(value: Any) -> Any:
    """`value` with null for numbers that are not finite, which JSON lacks."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value
