"""The event log of a search: what happened to its trials, in order.

A search that was killed reads its log again. The proposer and the stopper of trials (trial_manager.py) receive the
same events in the same order, and are in the same state. Tuner.restore, Tune's own way, reads pickles, and loses the
state of ASHA (Ray 2.60).

    search.json    {"format": "ddpm-search/1", "search_key": ..., "settings": {...}, "events": [...]}

    {"event": "begun", "trial": 3, "changes": {"optim.lr": 1e-3}}
    {"event": "judged", "trial": 3, "images_seen": 6400, "bits_per_dim": 2.1, ..., "goes_on": true}
    {"event": "ended", "trial": 3, "status": "stopped", "reason": "", "wall_s": 70.1, "training_s": 64.2}
    {"event": "drawn", "trial": 3, "name": "KID-classifier", "value": 0.01, "error": 0.002, ...}

wall_s: seconds for which the trial held a slot, one of --max-concurrent. They begin when the slot is assigned, include
all start-up, and end with training, when the slot is free for the next trial. If the trial is stopped or fails, they
end with that event; the time until its workers have left belongs to the next trial. training_s: the part of wall_s from
the end of the first step to the end of the last step, pictures and held-out losses included. After an interruption both
count from the trial's last start.

Only the search's driver writes the log. The file is small and written whole every time.
"""

import dataclasses
import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ddpm.storage.locations import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

FORMAT = "ddpm-search/1"
FILE = "search.json"
Metric = Literal["bits_per_dim", "held_out/loss", "train/loss"]
Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Rung:
    """Results of a trial's averaged weights at `images_seen`."""

    images_seen: int
    bits_per_dim: float
    """The whole bound of held-out images."""
    bits_per_dim_error: float
    """Its standard error, over the images."""
    held_out_loss: float
    train_loss: float
    """The training loss of training images."""
    training_s: float = 0.0
    """Seconds in which the loop has run since the trial's last start."""

    @property
    def shown(self) -> str:
        """The bound with its error, as text."""
        return f"{self.bits_per_dim:.4f} ± {self.bits_per_dim_error:.4f}"

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
    drawn: Mapping[str, Any] = field(default_factory=dict)
    """For a finalist, the scores.Score of its generated images."""

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
class _Card:
    """Content of the file."""

    format: Literal["ddpm-search/1"]
    search_key: str
    settings: dict[str, Any]
    events: list[dict[str, Any]]


def name_of(number: int) -> str:
    return f"trial-{number:03d}"


class EventLog:
    """The event log of the search in a folder or bucket; a new one is created if there is none.

    Args:
        place: the folder of the search.
        settings: everything that determines its trials, as JSON.
        timeout_s: how long storage may fail.

    Raises:
        UserError: the search there has other settings or is damaged, or storage refuses.
    """

    def __init__(self, place: Location, settings: Mapping[str, Any], timeout_s: float) -> None:
        self._file, self._timeout_s = place.child(FILE), timeout_s
        self._settings = json.loads(json.dumps(settings))
        self.key, self.events = uuid.uuid4().hex, list[dict[str, Any]]()
        try:
            text = retry_io(self._read, where=self._file.uri, timeout_s=timeout_s)
        except OSError as error:
            raise UserError(f"cannot read {self._file.uri}: {error}") from None
        if text is not None:
            self.key, self.events = self._parsed(text)
        else:
            self._write()

    @classmethod
    def existing(cls, place: Location) -> "EventLog":
        """The event log in a folder, with its own settings.

        Raises:
            UserError: there is none, or it is damaged.
        """
        file = place.child(FILE)
        try:
            text = file.read()
        except OSError as error:
            raise UserError(f"{file.uri} is not a search's event log: {error!r:.200}") from None
        return cls(place, strict_json.parse(_Card, text, f"{file.uri} is damaged").settings, 0.0)

    def add(self, event: str, trial: int, **what: Any) -> dict[str, Any]:
        """Append an event; it is stored when this returns."""
        made = {"event": event, "trial": trial, **what}
        self.events.append(made)
        self._write()
        return made

    def trials(self) -> list[Trial]:
        """All trials that began, in that order."""
        found: dict[int, Trial] = {}
        for event in self.events:
            what = {key: value for key, value in event.items() if key not in ("event", "trial")}
            number = event["trial"]
            match event["event"]:
                case "begun":
                    found[number] = Trial(number, what["changes"])
                case "judged":
                    what.pop("goes_on")
                    rungs = (*found[number].rungs, Rung(**what))
                    found[number] = dataclasses.replace(found[number], rungs=rungs)
                case "ended":
                    what.pop("training_s")
                    found[number] = dataclasses.replace(found[number], **what)
                case "drawn":
                    found[number] = dataclasses.replace(found[number], drawn=what)
        return list(found.values())

    def shares(self) -> Iterator[tuple[float, float]]:
        """(training_s, wall_s) of every trial that ended."""
        for event in self.events:
            if event["event"] == "ended":
                yield event["training_s"], event["wall_s"]

    def _read(self) -> bytes | None:
        return self._file.read() if self._file.exists() else None

    def _write(self) -> None:
        what = {"search_key": self.key, "settings": self._settings, "events": self.events}
        card = {"format": FORMAT, **what}
        data = (json.dumps(card, indent=1, allow_nan=False) + "\n").encode()
        retry_io(lambda: self._file.write(data), where=self._file.uri, timeout_s=self._timeout_s)

    def _parsed(self, text: bytes) -> tuple[str, list[dict[str, Any]]]:
        card = strict_json.parse(_Card, text, f"{self._file.uri} is damaged")
        self.events = card.events
        try:
            self.trials()
        except (KeyError, TypeError) as error:
            raise UserError(f"{self._file.uri} is damaged: {error!r:.200}") from None
        for name in sorted({*card.settings, *self._settings}):
            old, new = card.settings.get(name), self._settings.get(name)
            if old != new:
                raise UserError(
                    f"the search in {self._file.uri} was begun with {name} {old!r:.200}, not {new!r:.200}; "
                    "give the same value, or another --name"
                )
        return card.search_key, card.events


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
    """The finished trials, the best first; if there are none, the trials with the most images seen."""
    known = [trial for trial in trials if trial.last and trial.status != "failed"]
    farthest = max((trial.images_seen for trial in known), default=0)
    there = [trial for trial in known if trial.images_seen == farthest]
    return sorted(there, key=lambda trial: trial.value(metric))
