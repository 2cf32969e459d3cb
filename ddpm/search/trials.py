"""The trials of a search: each is a run in the search's folder, with its outcome beside its checkpoints.

    SEARCH/search.json             {"format": "ddpm-search/3", "search_key": ..., "settings": {...}}
    SEARCH/RUN/trial.json          number, changes, outcome and reason of a trial
    SEARCH/RUN/rungs/              what its loop measured (evaluation/rung.py)

A trial is named as every run is, by what differs from the preset. The search's driver alone writes trial.json. A new
driver lists the trials: those that have ended are added to Optuna and ASHA, the others resume.
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Final, Literal

from annotated_types import Ge
from pydantic import Field

from ddpm.evaluation import rung
from ddpm.evaluation.metrics import Estimate
from ddpm.evaluation.results import Score
from ddpm.evaluation.rung import Evaluation
from ddpm.runs.storage import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io
from ddpm.utils.tables import estimate

FORMAT: Final = "ddpm-search/3"
FILE = "search.json"
CARD = "trial.json"
Outcome = Literal["finished", "stopped", "failed"]
Status = Literal["running"] | Outcome
"""running: also a trial whose driver was killed."""


@dataclass(frozen=True)
class Trial:
    """One trial, with its results so far; all but `rungs` is the content of trial.json."""

    name: str
    """Name of its run, in the folder of the search."""
    number: Annotated[int, Ge(0)]
    """Its place in the order in which the trials began."""
    changes: dict[str, Any]
    """Dotted keys of a config, and the values that the search chose."""
    repeats: str | None = None
    """The trial that has the same configuration but for train.seed; None: a trial of the search itself."""
    status: Status = "running"
    reason: str = ""
    """Reason of a failure."""
    wall_s: Annotated[float, Ge(0)] = 0.0
    """Seconds from its last start to its end."""
    score: Score | None = None
    """For a finalist, KID of its generated images."""
    rungs: tuple[Evaluation, ...] = field(default=(), compare=False)

    @property
    def last(self) -> Evaluation | None:
        return self.rungs[-1] if self.rungs else None

    @property
    def images_seen(self) -> int:
        """Images seen at its last rung; 0: there is none."""
        return self.last.images_seen if self.last else 0

    @property
    def bits_per_dim(self) -> float:
        """What ranks the trial, at its last rung; inf: there is none."""
        return self.last.bits_per_dim.value if self.last else math.inf


@dataclass(frozen=True)
class SearchFile:
    """Content of search.json."""

    format: Literal["ddpm-search/3"]
    search_key: Annotated[str, Field(pattern="^[0-9a-z]+$")]
    settings: dict[str, Any]


def shown(value: Estimate) -> str:
    """A bound with its error, as text."""
    return estimate(value.value, value.error)


class Trials:
    """The trials in the folder or bucket of a search, which is created if there is none.

    Args:
        folder: of the search.
        settings: everything that determines its trials, as JSON; None: those of the search, which exists.
        timeout_s: how long storage may fail.

    Attributes:
        key: identifies the search in MLflow.
    """

    def __init__(self, folder: Location, settings: Mapping[str, Any] | None, timeout_s: float = 0.0) -> None:
        self.folder = folder
        self._timeout_s = timeout_s
        self.key = self._open(settings)
        self._trials = {trial.name: trial for trial in self._read_all()}

    def all(self) -> list[Trial]:
        """All trials, in the order in which they began."""
        return sorted(self._trials.values(), key=lambda trial: trial.number)

    def get(self, name: str) -> Trial | None:
        return self._trials.get(name)

    def begin(self, name: str, changes: Mapping[str, Any], repeats: str | None = None) -> Trial:
        """The trial of this name, which is created if there is none."""
        known = self._trials.get(name)
        if known is not None:
            return known
        number = 1 + max((trial.number for trial in self._trials.values()), default=-1)
        return self._keep(Trial(name, number, dict(changes), repeats))

    def read_rungs(self, name: str) -> Trial:
        """The trial with the rungs that are in its folder now."""
        trial = self._with_rungs(self._trials[name])
        self._trials[name] = trial
        return trial

    def end(self, name: str, status: Outcome, reason: str = "", wall_s: float = 0.0) -> Trial:
        """Store a trial's outcome, with the rungs that are in its folder now."""
        trial = self.read_rungs(name)
        return self._keep(replace(trial, status=status, reason=reason, wall_s=wall_s))

    def score(self, name: str, score: Score) -> Trial:
        """Store a trial's KID."""
        return self._keep(replace(self._trials[name], score=score))

    def _keep(self, trial: Trial) -> Trial:
        content = asdict(replace(trial, rungs=()))
        del content["rungs"]
        data = (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
        file = self.folder.child(trial.name).child(CARD)
        retry_io(lambda: file.write(data, durable=True), where=file.uri, timeout_s=self._timeout_s)
        self._trials[trial.name] = trial
        return trial

    def _read_all(self) -> list[Trial]:
        names = retry_io(self.folder.folders, where=self.folder.uri, timeout_s=self._timeout_s)
        read = [read_trial(self.folder.child(name), self._timeout_s) for name in names]
        return [self._with_rungs(trial) for trial in read if trial is not None]

    def _with_rungs(self, trial: Trial) -> Trial:
        run = self.folder.child(trial.name)
        found = [rung.read(run, at, self._timeout_s) for at in rung.recorded_at(run, self._timeout_s)]
        return replace(trial, rungs=tuple(found))

    def _open(self, settings: Mapping[str, Any] | None) -> str:
        """The search's key; a search that exists must have the same settings."""
        search = read_search(self.folder, settings, self._timeout_s)
        if search is not None:
            return search.search_key
        file = self.folder.child(FILE)
        if settings is None:
            raise UserError(f"{self.folder.uri} is not a search's folder: it has no {FILE}")
        search = SearchFile(FORMAT, uuid.uuid4().hex, dict(settings))
        data = (json.dumps(asdict(search), indent=1, allow_nan=False) + "\n").encode()
        retry_io(lambda: file.write(data, durable=True), where=file.uri, timeout_s=self._timeout_s)
        return search.search_key


def read_search(
    folder: Location, settings: Mapping[str, Any] | None, timeout_s: float = 0.0
) -> SearchFile | None:
    """search.json in a search's folder; None: there is none.

    Args:
        settings: those that the search must have; UserError if it has others. None: any.
    """
    file = folder.child(FILE)
    try:
        text = retry_io(file.read, where=file.uri, timeout_s=timeout_s)
    except FileNotFoundError:
        return None
    search = strict_json.parse(
        SearchFile,
        text,
        f"{file.uri} is damaged, or of another version (use another --name)",
        extra="ignore",
    )
    if settings is None:
        return search
    now = json.loads(json.dumps(settings))
    for name in sorted({*search.settings, *now}):
        old = search.settings.get(name)
        new = now.get(name)
        if old != new:
            raise UserError(
                f"the search in {file.uri} was begun with {name} {old!r:.200}, not {new!r:.200}; "
                "give the same value, or another --name"
            )
    return search


def read_trial(run: Location, timeout_s: float = 0.0) -> Trial | None:
    """trial.json in a run's folder, without its rungs; None: there is none."""
    file = run.child(CARD)
    try:
        text = retry_io(file.read, where=file.uri, timeout_s=timeout_s)
    except FileNotFoundError:
        return None
    return strict_json.parse(Trial, text, f"{file.uri} is damaged")


def rung_positions(total_images: int, batch_size: int, reduction_factor: int, num_rungs: int) -> list[int]:
    """Images seen at which trials are compared: the last is the end, each earlier one 1 / reduction_factor of the next.

    Args:
        total_images: length of a trial; rounded up to whole batches, as in training.
        num_rungs: at least 1; fewer if the first rung would be below one batch.

    Returns:
        Ascending; all but the last are multiples of the first.
    """
    total = -(-total_images // batch_size) * batch_size
    num_rungs = max(1, min(num_rungs, 1 + int(math.log(total / batch_size, reduction_factor) + 1e-9)))
    first = total // reduction_factor ** (num_rungs - 1) // batch_size * batch_size
    return [first * reduction_factor**k for k in range(num_rungs - 1)] + [total]


def best(trials: Sequence[Trial]) -> list[Trial]:
    """The search's own finished trials, the best first; if there are none, those with the most images seen."""
    known = [trial for trial in trials if trial.last and trial.status != "failed" and trial.repeats is None]
    farthest = max((trial.images_seen for trial in known), default=0)
    there = [trial for trial in known if trial.images_seen == farthest]
    return sorted(there, key=lambda trial: trial.bits_per_dim)


def changes_text(changes: Mapping[str, Any]) -> str:
    """Changes as text: optim.lr 0.00123, schedule.kind cosine."""
    return ", ".join(f"{key} {short(value)}" for key, value in changes.items()) or "nothing changed"


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
