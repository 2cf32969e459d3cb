"""Results of an evaluation, as JSON and as points of MLflow's curves."""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from ddpm.config import SampleConfig
from ddpm.evaluation.memorisation import NearerShare
from ddpm.evaluation.scores import Score
from ddpm.utils import strict_json

FORMAT = "ddpm-evaluation/1"
SETTINGS = ("spacing", "eta", "dynamic_threshold", "guidance_scale", "guidance_interval", "mean", "variance")
"""Settings of a sampler, besides its number of steps."""


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
    """A PNG of generated images beside their nearest training images. Not in the JSON; empty: no search."""

    @property
    def has_nearest(self) -> bool:
        """Whether the nearest training images were searched, so that a picture of them exists."""
        return any(isinstance(score, NearerShare) for score in self.scores)

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
    """Results of checkpoints that were evaluated with the same settings."""

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
            UserError: `text` is not a report, or is damaged; the message says `where`.
        """
        with contextlib.suppress(ValueError, RecursionError):  # strict_json.parse has the better message
            text = json.dumps(json.loads(text, object_hook=_finite_scores))
        where = f"{where} is not a result of jobs/evaluate.py"
        found = strict_json.parse(_Saved, text, where, extra="ignore")
        return cls(found.settings, found.checkpoints)


@dataclass(frozen=True)
class _Saved:
    """The part of a report's JSON that is read back."""

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


def nearest_pictures(report: Report, out: str) -> Iterator[tuple[str, CheckpointResult, Drawn]]:
    """The pictures of the nearest pairs of all ways of sampling, with their names beside the file `out`.

    "digits.json" has "digits-nearest.png", or "digits-nearest-RUN-IMAGES_SEEN-WAY.png" where there are several.
    """
    found = [(result, drawn) for result in report.results for drawn in result.drawn if drawn.has_nearest]
    folder, slash, name = out.rpartition("/")
    stem = f"{folder}{slash}{PurePosixPath(name).stem}-nearest"
    words = [f"{result.run}-{result.images_seen}-{drawn.name}" for result, drawn in found]
    if len(set(words)) < len(found):  # two runs with the same name
        words = [f"{word}-{v.weights_sha256[:8]}" for word, (v, _) in zip(words, found, strict=True)]
    for word, pair in zip(words, found, strict=True):
        suffix = "-" + re.sub(r"[^\w.-]+", "-", word) if len(found) > 1 else ""
        yield f"{stem}{suffix}.png", *pair


def metrics(result: CheckpointResult) -> dict[str, float]:
    """Points of curves over images seen: eval/bits_per_dim, eval/KID-lite0, ...

    MLflow groups metrics by the first part of their name: errors are eval_error/KID-lite0, ..., values of real images
    against real ones eval_floor/KID-lite0, ..., intervals eval_low/..., eval_high/.... A way of sampling other than the
    run's own is part of the name: eval/dpmpp_2m-20/KID-lite0. So is a variance other than the default:
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
