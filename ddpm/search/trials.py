"""The trials of a search: each is a run in the search's folder, with its outcome beside its checkpoints.

    SEARCH/search.json             {"format": "ddpm-search/4", "search_key": ..., "settings": {...}, ...}
    SEARCH/RUN/trial.json          number, changes, outcome and reason of a trial
    SEARCH/RUN/rungs/              what its loop measured (evaluation/rung.py)

A trial is named as every run is, by what differs from the preset. The search's driver alone writes search.json and
trial.json. A new driver lists the trials: those that have ended are added to Optuna and ASHA, the others resume.
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from annotated_types import Ge
from pydantic import Field

from ddpm.config.json import from_json, override, to_json
from ddpm.config.tree import Config
from ddpm.evaluation import rung
from ddpm.evaluation.metrics import Estimate
from ddpm.evaluation.rung import Evaluation
from ddpm.runs.evaluations import Score
from ddpm.runs.run_folder import RunStatus
from ddpm.runs.storage import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io
from ddpm.utils.tables import estimate

FORMAT: Final = "ddpm-search/4"
FILE = "search.json"
CARD = "trial.json"


@dataclass(frozen=True)
class SearchFile:
    """Content of search.json. The newest command sets what follows the settings; the rest never changes."""

    format: Literal["ddpm-search/4"]
    search_key: Annotated[str, Field(pattern="^[0-9a-z]+$")]
    """Identifies the search in MLflow."""
    settings: dict[str, Any]
    """Everything that determines the trials."""
    config: dict[str, Any]
    """The content of config.json: the search's config before `trial_config`."""
    kid: str
    """Name of the finalists' score, such as KID-lite0."""
    kid_images: int
    """Number of generated images that it compares."""

    @classmethod
    def new(cls, settings: Mapping[str, Any], config: Config, kid: str, kid_images: int) -> "SearchFile":
        """The file of a new search."""
        content = json.loads(to_json(config))
        return cls(FORMAT, uuid.uuid4().hex, json.loads(json.dumps(settings)), content, kid, kid_images)

    def check_settings(self, now: Mapping[str, Any], where: str) -> None:
        """Raise UserError if the search in the file `where` was begun with other settings than `now`."""
        for name in sorted({*self.settings, *now}):
            old = self.settings.get(name)
            new = now.get(name)
            if old != new:
                raise UserError(
                    f"the search in {where} was begun with {name} {old!r:.200}, not {new!r:.200}; "
                    "give the same value, or another --name"
                )


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
    status: RunStatus = RunStatus.RUNNING
    """RUNNING until it has ended, also if its driver was killed or stopped."""
    reason: str = ""
    """Reason of a failure."""
    wall_s: Annotated[float, Ge(0)] = 0.0
    """Seconds from its last start to its end."""
    score: Score | None = None
    """For a finalist, KID of its generated images."""
    rungs: tuple[Evaluation, ...] = field(default=(), compare=False)

    @property
    def has_ended(self) -> bool:
        return self.status != RunStatus.RUNNING

    @property
    def outcome(self) -> str:
        """Its status in a table of trials, where `stopped` means PRUNED."""
        return "stopped" if self.status == RunStatus.PRUNED else self.status.text

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


class Trials:
    """The trials in the folder or bucket of a search.

    Args:
        timeout_s: how long storage may fail.

    Attributes:
        folder: of the search.
        file: the content of search.json.
    """

    def __init__(self, folder: Location, timeout_s: float = 0.0) -> None:
        file = read_search(folder, timeout_s)
        if file is None:
            raise UserError(f"{folder.uri} is not a search's folder: it has no {FILE}")
        self.folder = folder
        self.file = file
        self._timeout_s = timeout_s
        self._trials = dict[str, Trial]()
        for name in retry_io(folder.folders, where=folder.uri, timeout_s=timeout_s):
            run = folder.child(name)
            trial = read_trial(run, timeout_s)
            if trial is not None:
                rungs = [rung.read(run, at, timeout_s) for at in rung.recorded_at(run, timeout_s)]
                self._trials[trial.name] = replace(trial, rungs=tuple(rungs))

    @cached_property
    def config(self) -> Config:
        """The search's config before `trial_config`."""
        return from_json(json.dumps(self.file.config), self.folder.child(FILE).uri)

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

    def reach(self, name: str, evaluation: Evaluation) -> bool:
        """Take note of a trial's rung, which its process has stored; returns whether it is a new one."""
        trial = self._trials[name]
        if evaluation.images_seen <= trial.images_seen:
            return False
        self._trials[name] = replace(trial, rungs=(*trial.rungs, evaluation))
        return True

    def end(self, name: str, status: RunStatus, reason: str = "", wall_s: float = 0.0) -> Trial:
        """Store a trial's outcome."""
        return self._keep(replace(self._trials[name], status=status, reason=reason, wall_s=wall_s))

    def score(self, name: str, score: Score) -> Trial:
        """Store a trial's KID."""
        return self._keep(replace(self._trials[name], score=score))

    def _keep(self, trial: Trial) -> Trial:
        content = asdict(replace(trial, rungs=()))
        del content["rungs"]
        _write(self.folder.child(trial.name).child(CARD), content, self._timeout_s)
        self._trials[trial.name] = trial
        return trial


def begin_search(folder: Location, search: SearchFile, timeout_s: float = 0.0) -> Trials:
    """The trials of the search in a folder, which is created if there is none.

    A search that exists keeps its key; UserError if it was begun with other settings.
    """
    file = folder.child(FILE)
    before = read_search(folder, timeout_s)
    if before is not None:
        before.check_settings(search.settings, file.uri)
        search = replace(search, search_key=before.search_key)
    if search != before:
        _write(file, asdict(search), timeout_s)
    return Trials(folder, timeout_s)


def read_search(folder: Location, timeout_s: float = 0.0) -> SearchFile | None:
    """search.json in a search's folder; None: there is none."""
    file = folder.child(FILE)
    text = _read(file, timeout_s)
    if text is None:
        return None
    damaged = f"{file.uri} is damaged, or of another version (use another --name)"
    return strict_json.parse(SearchFile, text, damaged, extra="ignore")


def read_trial(run: Location, timeout_s: float = 0.0) -> Trial | None:
    """trial.json in a run's folder, without its rungs; None: there is none."""
    file = run.child(CARD)
    text = _read(file, timeout_s)
    return None if text is None else strict_json.parse(Trial, text, f"{file.uri} is damaged")


def _read(file: Location, timeout_s: float) -> bytes | None:
    """The content of a file; None: there is none."""
    try:
        return retry_io(file.read, where=file.uri, timeout_s=timeout_s)
    except FileNotFoundError:
        return None


def _write(file: Location, content: Mapping[str, Any], timeout_s: float) -> None:
    data = (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
    retry_io(lambda: file.write(data, durable=True), where=file.uri, timeout_s=timeout_s)


def trial_config(config: Config, rungs: Sequence[int], folder: Location) -> Config:
    """The config that trials change: a search's config, with a checkpoint at each rung, in the search's folder."""
    every = rungs[0] if len(rungs) > 1 else min(rungs[0], config.train.checkpoint_every_images)
    return override(
        config,
        {
            "train.total_images": rungs[-1],
            "train.checkpoint_every_images": every,
            "train.keep_checkpoints": -(-rungs[-1] // rungs[0]),
            "run.storage": folder.uri,
        },
    )


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
    known = [
        trial for trial in trials if trial.last and trial.status != RunStatus.FAILED and trial.repeats is None
    ]
    farthest = max((trial.images_seen for trial in known), default=0)
    there = [trial for trial in known if trial.images_seen == farthest]
    return sorted(there, key=lambda trial: trial.bits_per_dim)


def changes_text(changes: Mapping[str, Any]) -> str:
    """Changes as text: optim.lr 0.00123, schedule.kind cosine."""
    return ", ".join(f"{key} {short(value)}" for key, value in changes.items()) or "nothing changed"


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def shown(value: Estimate) -> str:
    """A bound with its error, as text."""
    return estimate(value.value, value.error)
