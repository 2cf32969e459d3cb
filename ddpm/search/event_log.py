"""The event log of a search: what happened to its trials, in order.

A search that was killed reads its log again. The proposer of trials receives the same events in the same order, and is
in the same state; early stops follow from the log (trial_manager.py). Tuner.restore, Tune's own way, reads pickles, and
loses the state of Tune's ASHA (Ray 2.60).

    search.json    {"format": "ddpm-search/2", "search_key": ..., "settings": {...}, "events": [...]}

    {"event": "begun", "trial": 3, "changes": {"optim.lr": 1e-3}, "repeats": null}
    {"event": "evaluated", "trial": 3, "rung": {"images_seen": 6400, "bits_per_dim": 2.1, ...}, "should_continue": true}
    {"event": "ended", "trial": 3, "status": "stopped", "reason": "", "wall_s": 70.1, "training_s": 64.2}
    {"event": "scored", "trial": 3, "score": {"name": "KID-classifier", "value": 0.01, "error": 0.002, ...}}

repeats: the trial whose configuration is trained again, with another train.seed, after the search's own trials.
wall_s: seconds for which the trial held a slot, one of --max-concurrent. They begin when the slot is assigned, include
all start-up, and end with training, when the slot is free for the next trial. If the trial is stopped or fails, they
end with that event; the time until its workers have left belongs to the next trial. training_s: the part of wall_s from
the end of the first step to the end of the last step, pictures and held-out losses included. After an interruption both
count from the trial's last start.

Only the search's driver writes the log. The file is small and written whole every time.
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Final, Literal

from annotated_types import Ge
from pydantic import Field

from ddpm.evaluation.scores import Score
from ddpm.search.config import Metric
from ddpm.storage.locations import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io
from ddpm.utils.tables import estimate

FORMAT: Final = "ddpm-search/2"
FILE = "search.json"
Outcome = Literal["finished", "stopped", "failed"]
Status = Literal["running"] | Outcome
Count = Annotated[int, Ge(0)]
Seconds = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class Rung:
    """Results of a trial's averaged weights at `images_seen`, on images that rank trials (evaluator.RANKING)."""

    images_seen: Count
    bits_per_dim: float
    """The whole bound of held-out images."""
    bits_per_dim_error: float
    """Its standard error, over the images."""
    held_out_loss: float
    train_loss: float
    """The training loss of training images."""
    training_s: Seconds = 0.0
    """Seconds in which the loop has run since the trial's last start."""

    @property
    def shown(self) -> str:
        """The bound with its error, as text."""
        return estimate(self.bits_per_dim, self.bits_per_dim_error)

    def value(self, metric: Metric) -> float:
        return float(getattr(self, metric.replace("/", "_")))


@dataclass(frozen=True)
class Trial:
    """One trial, with its results so far."""

    number: int
    changes: Mapping[str, Any]
    """Dotted keys of a config, and the values that the search chose."""
    rungs: tuple[Rung, ...] = ()
    status: Status = "running"
    reason: str = ""
    """Reason of a failure."""
    wall_s: float = 0.0
    score: Score | None = None
    """For a finalist, KID of its generated images."""
    repeats: int | None = None
    """The trial that has the same configuration but for train.seed; None: a trial of the search itself."""

    @property
    def name(self) -> str:
        """Name of its run, in the folder of the search."""
        return name_of(self.number)

    @property
    def last(self) -> Rung | None:
        return self.rungs[-1] if self.rungs else None

    @property
    def images_seen(self) -> int:
        """Images seen at its last rung; 0: there is none."""
        return self.last.images_seen if self.last else 0

    def value(self, metric: Metric) -> float:
        """The metric at its last rung; inf: there is none."""
        return self.last.value(metric) if self.last else math.inf


@dataclass(frozen=True)
class Begun:
    trial: Count
    changes: dict[str, Any]
    repeats: Count | None = None
    event: Literal["begun"] = "begun"


@dataclass(frozen=True)
class Evaluated:
    trial: Count
    rung: Rung
    should_continue: bool
    event: Literal["evaluated"] = "evaluated"


@dataclass(frozen=True)
class Ended:
    trial: Count
    status: Outcome
    reason: str
    wall_s: Seconds
    training_s: Seconds
    event: Literal["ended"] = "ended"


@dataclass(frozen=True)
class Scored:
    trial: Count
    score: Score
    event: Literal["scored"] = "scored"


Event = Begun | Evaluated | Ended | Scored


@dataclass(frozen=True)
class _Card:
    """Content of the file."""

    format: Literal["ddpm-search/2"]
    search_key: str
    settings: dict[str, Any]
    events: list[Annotated[Event, Field(discriminator="event")]]


def name_of(number: int) -> str:
    return f"trial-{number:03d}"


class EventLog:
    """The event log of the search in a folder or bucket; a new one is created if there is none.

    Args:
        folder: of the search.
        settings: everything that determines its trials, as JSON; None: those of the log, which exists.
        timeout_s: how long storage may fail.

    Attributes:
        key: identifies the search in MLflow.
        events: all events, the oldest first.
    """

    def __init__(self, folder: Location, settings: Mapping[str, Any] | None, timeout_s: float) -> None:
        self._file, self._timeout_s = folder.child(FILE), timeout_s
        self._settings = json.loads(json.dumps(settings))
        self.key, self.events = uuid.uuid4().hex, list[Event]()
        self._trials: dict[int, Trial] = {}
        try:
            self._parse(retry_io(self._file.read, where=self._file.uri, timeout_s=timeout_s))
        except FileNotFoundError:
            if settings is None:
                raise UserError(f"{folder.uri} is not a search's folder: it has no {FILE}") from None
            self._write()

    @classmethod
    def existing(cls, folder: Location) -> "EventLog":
        """The event log in a folder, with its own settings."""
        return cls(folder, None, 0.0)

    def add(self, event: Event) -> None:
        """Append an event; it is stored when this returns."""
        self._trials[event.trial] = _after(event, self._trials)
        self.events.append(event)
        self._write()

    def trials(self) -> list[Trial]:
        """All trials that began, in that order."""
        return list(self._trials.values())

    def _write(self) -> None:
        card = _Card(FORMAT, self.key, self._settings, self.events)
        data = (json.dumps(asdict(card), indent=1, allow_nan=False) + "\n").encode()
        retry_io(lambda: self._file.write(data), where=self._file.uri, timeout_s=self._timeout_s)

    def _parse(self, text: bytes) -> None:
        uri = self._file.uri
        card = strict_json.parse(_Card, text, f"{uri} is damaged, or of another version (use another --name)")
        for event in card.events:
            self._trials[event.trial] = _after(event, self._trials)
        if self._settings is None:
            self._settings = card.settings
        for name in sorted({*card.settings, *self._settings}):
            old, new = card.settings.get(name), self._settings.get(name)
            if old != new:
                raise UserError(
                    f"the search in {uri} was begun with {name} {old!r:.200}, not {new!r:.200}; "
                    "give the same value, or another --name"
                )
        self.key, self.events = card.search_key, card.events


def _after(event: Event, trials: Mapping[int, Trial]) -> Trial:
    """The event's trial after it."""
    if isinstance(event, Begun):
        return Trial(event.trial, event.changes, repeats=event.repeats)
    trial = trials[event.trial]
    match event:
        case Evaluated():
            return replace(trial, rungs=(*trial.rungs, event.rung))
        case Ended():
            return replace(trial, status=event.status, reason=event.reason, wall_s=event.wall_s)
        case Scored():
            return replace(trial, score=event.score)


def rungs(total_images: int, batch_size: int, reduction_factor: int, num_rungs: int) -> list[int]:
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


def best(trials: Sequence[Trial], metric: Metric) -> list[Trial]:
    """The search's own finished trials, the best first; if there are none, those with the most images seen."""
    known = [trial for trial in trials if trial.last and trial.status != "failed" and trial.repeats is None]
    farthest = max((trial.images_seen for trial in known), default=0)
    there = [trial for trial in known if trial.images_seen == farthest]
    return sorted(there, key=lambda trial: trial.value(metric))
