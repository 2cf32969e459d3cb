"""What a search knows of its trials: a events of what happened, in the order in which it happened.

A search that was killed reads its events again. Whoever proposes trials and whoever stops them (manager.py) are told
the same things in the same order, and so are where they were. Tune's own way, Tuner.restore, reads pickles, and forgets
what ASHA knew (Ray 2.60).

    search.json    {"format": "ddpm-search/1", "search_key": ..., "settings": {...}, "events": [...]}

    {"event": "begun", "trial": 3, "changes": {"optim.lr": 1e-3}}
    {"event": "judged", "trial": 3, "images_seen": 6400, "bits_per_dim": 2.1, ..., "goes_on": true}
    {"event": "ended", "trial": 3, "status": "stopped", "reason": "", "wall_s": 70.1, "training_s": 64.2}
    {"event": "drawn", "trial": 3, "name": "KID-classifier", "value": 0.01, "error": 0.002, ...}

wall_s are the seconds for which the trial had a seat, one of --max-concurrent: from when it was given it, through all
that starts then, to when its training was over and the seat free for the next trial (or, of one that is stopped or
fails, to when that was said; until its workers have left, the time is the next trial's). training_s are those of them
from the end of its first step to the end of its last one, with its pictures and held-out losses. Both since the trial
last began, if the search was interrupted.

The one process that writes it is the search's driver, whole every time: it is small.
"""

import dataclasses
import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

FORMAT = "ddpm-search/1"
LEDGER = "search.json"
Metric = Literal["bits_per_dim", "held_out/loss", "train/loss"]
Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Rung:
    """What was found of a trial's averaged weights after so many images."""

    images_seen: int
    bits_per_dim: float
    """The whole bound, of held-out images."""
    bits_per_dim_error: float
    """Its standard error, over the images."""
    held_out_loss: float
    train_loss: float
    """The loss trained on, of training images."""
    training_s: float = 0.0
    """Seconds in which the loop ran so far, since the trial last began."""

    def value(self, metric: Metric) -> float:
        return float(getattr(self, metric.replace("/", "_")))


@dataclass(frozen=True)
class Trial:
    """One trial, as far as it got."""

    number: int
    changes: Mapping[str, Any]
    """Dotted keys of a config, and what the search made of them."""
    rungs: tuple[Rung, ...] = ()
    status: Status = "running"
    reason: str = ""
    """Why it failed."""
    wall_s: float = 0.0
    drawn: Mapping[str, Any] = field(default_factory=dict)
    """Of a finalist: a scores.Score of its drawn images."""

    @property
    def name(self) -> str:
        """Its run, in the folder of the search."""
        return name_of(self.number)

    @property
    def last(self) -> Rung | None:
        return self.rungs[-1] if self.rungs else None


def name_of(number: int) -> str:
    return f"trial-{number:03d}"


class EventLog:
    """The events of the search in a folder or bucket; a new one, if there is none.

    Args:
        place: the folder of the search.
        settings: all that decides what its trials are, as JSON has it.
        timeout_s: how long storage may fail.

    Raises:
        UserError: the search there is another one, or damaged, or storage refuses.
    """

    def __init__(self, place: Location, settings: Mapping[str, Any], timeout_s: float) -> None:
        self._file, self._timeout_s = place.child(LEDGER), timeout_s
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
    def existing(cls, place: Location, timeout_s: float = 0.0) -> "EventLog":
        """The events that is in a folder, whatever its settings.

        Raises:
            UserError: there is none, or it is damaged.
        """
        file = place.child(LEDGER)
        try:
            settings = json.loads(file.read())["settings"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file.uri} is no search's events: {error!r:.200}") from None
        return cls(place, settings, timeout_s)

    def add(self, event: str, trial: int, **what: Any) -> dict[str, Any]:
        """Note what happened; it is safe when this returns."""
        made = {"event": event, "trial": trial, **what}
        self.events.append(made)
        self._write()
        return made

    def trials(self) -> list[Trial]:
        """All that began, in that order."""
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
        card = {
            "format": FORMAT,
            "search_key": self.key,
            "settings": self._settings,
            "events": self.events,
        }
        data = (json.dumps(card, indent=1, allow_nan=False) + "\n").encode()
        retry_io(lambda: self._file.write(data), where=self._file.uri, timeout_s=self._timeout_s)

    def _parsed(self, text: bytes) -> tuple[str, list[dict[str, Any]]]:
        try:
            card = json.loads(text)
            key, settings, events = card["search_key"], card["settings"], card["events"]
            if card["format"] != FORMAT or not isinstance(key, str) or not key.isalnum():
                raise ValueError(f"it is not of format {FORMAT}")
            self.events = events
            self.trials()
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
            raise UserError(f"{self._file.uri} is damaged: {error!r:.200}") from None
        for name in sorted({*settings, *self._settings}):
            old, new = settings.get(name), self._settings.get(name)
            if old != new:
                raise UserError(
                    f"the search in {self._file.uri} was begun with {name} {old!r:.200}, not {new!r:.200}; "
                    "give the same, or another --name"
                )
        return key, events


def rungs(total_images: int, batch_size: int, reduction_factor: int, num_rungs: int) -> list[int]:
    """The images seen at which trials are compared: the last is the end, each before it a factor earlier.

    Args:
        total_images: of a trial; rounded up to whole batches, as training does.
        num_rungs: at least 1; fewer, where the first would not be one batch.

    Returns:
        Ascending; all but the last are multiples of the first.
    """
    total = -(-total_images // batch_size) * batch_size
    num_rungs = max(1, min(num_rungs, 1 + int(math.log(total / batch_size, reduction_factor) + 1e-9)))
    first = total // reduction_factor ** (num_rungs - 1) // batch_size * batch_size
    return [first * reduction_factor**k for k in range(num_rungs - 1)] + [total]


def best(trials: Sequence[Trial], metric: Metric) -> list[Trial]:
    """Those that came to their end, the best first; with none, those that came farthest."""
    known = [trial for trial in trials if trial.last is not None and trial.status != "failed"]
    farthest = max((trial.last.images_seen for trial in known if trial.last), default=0)
    there = [trial for trial in known if trial.last and trial.last.images_seen == farthest]
    return sorted(there, key=lambda trial: trial.last.value(metric) if trial.last else math.inf)
