"""Results of an evaluation, from the measuring to tables, pages and MLflow: as data, and as JSON in a run's folder."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import TypeAdapter, WrapValidator

from ddpm.config.tree import SampleConfig
from ddpm.runs.storage import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.progress import printable

FORMAT = "ddpm-evaluation/3"
"""Of the JSON of a report."""
SETTINGS = ("spacing", "sigma_min", "eta", "guidance_scale", "guidance_interval", "mean", "variance")
"""Settings of a sampler, besides its number of steps."""


def _number(value: Any, parse: Any) -> float:
    if value is None:
        return math.nan
    return float(parse(value))


Number = Annotated[float, WrapValidator(_number)]
"""A number that is null in JSON if it is not finite."""


@dataclass(frozen=True)
class Score:
    """One metric with its uncertainty."""

    name: str
    """Name with the feature net: "KID-lite0"."""
    value: Number
    error: Number
    """Standard error of redrawing generated and real images (jackknife.py); for bits/dim, over images."""
    n: int
    """Generated images; for bits/dim, real ones."""
    n_real: int | None = None
    """Real images in the comparison."""
    floor: float | None = None
    """Value of real images against real images."""
    floor_error: float | None = None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.error)


@dataclass(frozen=True, kw_only=True)
class NearerShare(Score):
    """The share of generated images nearer to a training image than 99 % of held-out images (memorisation.py).

    `n_real` counts held-out images. `floor` is the share expected of other held-out images, k / (M + 1) for the k-th
    smallest distance, and `floor_error` its standard deviation among N of them. `error` is the half width of the
    interval over 1.96; the interval is not symmetric.
    """

    n_real: int
    floor: float
    low: float
    """The lower end of the 95 % interval, over generated and held-out images."""
    high: float


@dataclass(frozen=True)
class SampledScores:
    """Scores of the images of one sampling configuration, in which sampler and number of steps are filled in."""

    sample: SampleConfig
    is_own: bool
    """Whether these are the run's own settings."""
    scores: tuple[NearerShare | Score, ...]
    """Those of memorisation, if any, are last."""
    nearest: bytes = field(default=b"", repr=False, compare=False)
    """A PNG of generated images beside their nearest training images. Not in the JSON; empty: no search."""

    @property
    def has_nearest(self) -> bool:
        """Whether the nearest training images were searched, so that a picture of them exists."""
        return any(isinstance(score, NearerShare) for score in self.scores)

    @property
    def name(self) -> str:
        """The sampler with its steps, and its settings that are not defaults: "ddim-50 eta 0.5"."""
        words = [f"{self.sample.sampler}-{self.sample.num_sample_steps}"]
        for setting in SETTINGS:
            value = getattr(self.sample, setting)
            if value not in (getattr(SampleConfig, setting), "beta_tilde"):
                parts = value if isinstance(value, tuple) else (value,)
                words.append(" ".join(map(str, (setting, *parts))))
        return " ".join(words)


@dataclass(frozen=True)
class CheckpointResult:
    """Results of one checkpoint, a folder or URI, and of its averaged weights."""

    checkpoint: str
    weights_sha256: str
    run: str
    run_key: str
    """Empty: imported, without a run."""
    images_seen: int
    saw_this_data: bool
    """Whether it was trained on the data set of these held-out images."""
    bits: Score | None
    """The bound of the held-out images; None: the process has none."""
    drawn: SampledScores
    bits_of_image: tuple[float, ...] = ()
    """Bits/dim of each held-out image, rounded, for comparisons image by image."""

    @property
    def scores(self) -> tuple[Score, ...]:
        """All scores, bits/dim first."""
        bits = () if self.bits is None else (self.bits,)
        return (*bits, *self.drawn.scores)


@dataclass(frozen=True)
class Report:
    """Results of checkpoints, and everything else that determines them: the settings."""

    settings: Mapping[str, Any]
    results: tuple[CheckpointResult, ...]
    time_ms: int = field(default=0, compare=False)
    """When these results were first written to the run's folder; 0: they were not."""

    @property
    def key(self) -> str:
        """A name that is equal for equal checkpoints and settings; it sorts by the newest checkpoint."""
        what = [(v.weights_sha256, v.images_seen, v.drawn.sample) for v in self.results]
        digest = hashlib.sha256(repr((self.settings, what)).encode()).hexdigest()
        return f"{max(v.images_seen for v in self.results):012d}-{digest[:8]}"

    def of_run(self, run_key: str) -> "Report":
        """The results of one run."""
        return replace(self, results=tuple(v for v in self.results if v.run_key == run_key))

    def to_json(self) -> str:
        """All scores with n, uncertainty and floor; null stands for a number that is not finite."""
        saved = _Saved(FORMAT, self.time_ms, dict(self.settings), self.results)
        pictures = {"checkpoints": {"__all__": {"drawn": {"nearest"}}}}
        return TypeAdapter(_Saved).dump_json(saved, indent=2, exclude=pictures).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Report":
        """The report that `to_json` wrote, without pictures.

        Raises:
            UserError: it is damaged, or another version wrote it.
        """
        wrong = f"{where} is not a result of this version's ddpm evaluate"
        stored = strict_json.parse(_Format, text, wrong, extra="ignore").format
        if stored != FORMAT:
            raise UserError(f"{wrong}: its format is {stored[:40]!r}, not {FORMAT!r}; evaluate again")
        saved = strict_json.parse(_Saved, text, wrong, extra="ignore")
        return cls(saved.settings, saved.checkpoints, saved.time_ms)


@dataclass(frozen=True)
class _Format:
    """What every version's report has."""

    format: str


@dataclass(frozen=True)
class _Saved(_Format):
    """A report's JSON."""

    time_ms: int
    settings: dict[str, Any]
    checkpoints: tuple[CheckpointResult, ...]


def nearest_pictures(report: Report, out: str) -> Iterator[tuple[str, CheckpointResult]]:
    """The results that have a picture of nearest pairs, with its name beside the file `out`.

    "digits.json" has "digits-nearest.png", or "digits-nearest-1.png", ... in the order of several results.
    """
    pictured = [result for result in report.results if result.drawn.has_nearest]
    folder, slash, name = out.rpartition("/")
    stem = f"{folder}{slash}{PurePosixPath(name).stem}-nearest"
    for number, result in enumerate(pictured, start=1):
        suffix = f"-{number}" if len(pictured) > 1 else ""
        yield f"{stem}{suffix}.png", result


def read_reports(folder: Location, warn: Callable[[str], object]) -> dict[str, Report]:
    """The reports in a folder by file name; what cannot be read is left out, with a line to `warn`."""
    reports = {}
    for name in folder.files():
        if not name.endswith(".json"):
            continue
        file = folder.child(name)
        try:
            reports[name] = Report.from_json(file.read(), file.uri)
        except UserError as error:
            warn(printable(str(error)))
    return reports
