"""A run's folder, the record of the run: everything after training reads it, and nothing else.

run.json       what the run was when it began: key, configuration, data, command
status.json    the run's status
generations.json         which checkpoints and points count (generations.py)
checkpoint-*/  best-*/   (checkpoint.py)      metrics/   (curves.py)
samples/  denoising/     a picture for each multiple of train.sample_every_images; its time is in the PNG
pictures/      pictures of the finished run
evaluations/   results of ddpm evaluate
"""

import contextlib
import json
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from annotated_types import Ge

from ddpm.config.tree import Config
from ddpm.runs import generations, storage
from ddpm.runs.generations import Generations
from ddpm.runs.shared_file import shared_file
from ddpm.runs.storage import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error

PREFIX = "checkpoint-"
"""What the name of a checkpoint's folder begins with; images_seen and the generation follow."""
BEST_PREFIX = "best-"
_CHECKPOINT = re.compile(
    rf"(?P<prefix>{PREFIX}|{BEST_PREFIX})(?P<images_seen>\d{{12,19}}){generations.SUFFIX.pattern}"
)
CHECKSUMS = "checksums.json"
"""File of a checkpoint that is written last: a folder without it is not one."""
EVALUATIONS = "evaluations"
"""Folder of a run with the results of ddpm evaluate."""
SAMPLES = "samples"
DENOISING = "denoising"
PICTURES = "pictures"
PICTURE = re.compile(r"(?P<images_seen>\d{12,19})\.png")
"""File name of a picture in `samples` and `denoising`."""
CARD = "run.json"
STATUS = "status.json"
"""File of a run with its status."""
MAX_NAME_BYTES = 240
"""A folder's name has at most 255 bytes on most disks, and MLflow's name of a run 250."""
WRITE_CHECK = ".write-check"
"""File beside the runs that is written and removed before anything else is."""
RESERVED = "data"
"""Folder beside the runs that holds prepared sources."""


class RunStatus(StrEnum):
    """The status of a run. Each member is its name in status.json.

    STOPPED: the same command resumes the run. PRUNED: a search stopped it early, and never resumes it.

    Attributes:
        in_mlflow: MLflow's status. A run that can be resumed is SCHEDULED there: MLflow's pages show KILLED in red,
            like a failure.
        text: the status in words.
    """

    in_mlflow: str
    text: str

    RUNNING = "RUNNING", "RUNNING", "running"
    FINISHED = "FINISHED", "FINISHED", "finished"
    STOPPED = "STOPPED", "SCHEDULED", "stopped"
    PRUNED = "PRUNED", "KILLED", "stopped early"
    FAILED = "FAILED", "FAILED", "failed"

    def __new__(cls, value: str, in_mlflow: str, text: str) -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.in_mlflow = in_mlflow
        member.text = text
        return member


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, however often the run is restarted."""

    name: str
    location: Location
    key: str
    """Random, created once; identifies the run in MLflow."""


@dataclass(frozen=True)
class Data:
    """The images that a run began with."""

    source: str
    fingerprint: str
    uri: str
    split: str
    num_images: int
    shape: tuple[int, ...]
    num_classes: int


@dataclass(frozen=True)
class Search:
    """The search that a run is a trial of."""

    name: str
    key: str


@dataclass(frozen=True)
class Facts:
    """What a run was when it began."""

    preset: str = ""
    changed: dict[str, Any] = field(default_factory=dict)
    """`settings.differences` from the preset."""
    config: dict[str, Any] = field(default_factory=dict)
    """The content of a checkpoint's config.json."""
    data: Data | None = None
    command: str = ""
    """Resumes the run; empty for the trial of a search."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages, and the git commit."""
    search: Search | None = None


@dataclass(frozen=True, kw_only=True)
class Card(Facts):
    """Content of run.json."""

    name: str
    run_key: str
    created_ms: int


@dataclass(frozen=True)
class Status:
    """Content of status.json. Rank 0 writes it while training, and the driver at the end."""

    status: RunStatus
    """RUNNING also after the driver was killed."""
    images_seen: Annotated[int, Ge(0)]
    """Where training was; the newest checkpoint may be earlier."""
    images_lost: Annotated[int, Ge(0)]
    """Images lost to crashes: trained on again from an older checkpoint."""
    minutes: Annotated[float, Ge(0)]
    """Time of training, of all starts together."""
    hardware: str = ""
    ended_ms: int | None = None
    """When training ended, in milliseconds since 1970; None: it has not."""
    generation: Annotated[int, Ge(0)] = 0
    """Of the workers that wrote it last."""


class CheckpointName(NamedTuple):
    """Name of a checkpoint's folder: checkpoint-000000002560-g1; names sort by age."""

    images_seen: int
    generation: int
    prefix: str = PREFIX

    @classmethod
    def parse(cls, name: str) -> "CheckpointName | None":
        """The name of a folder; None: it is no checkpoint's, or a user's copy."""
        match = _CHECKPOINT.fullmatch(name)
        if match is None:
            return None
        return cls(int(match["images_seen"]), int(match["generation"]), match["prefix"])

    def __str__(self) -> str:
        return f"{self.prefix}{self.images_seen:012d}{generations.suffix(self.generation)}"

    def counts(self, found: Generations) -> bool:
        """Whether this checkpoint counts: it is not being removed, and no older generation stored it too late."""
        return found.oldest <= self.images_seen <= found.last_checkpoint(self.generation)


def with_storage(config: Config) -> Config:
    """`config` with an absolute storage URI; UserError if its run's name cannot be a folder's."""
    if config.run.name is not None:
        _check_name(config.run.name)
    uri = storage.resolve(config.run.storage).uri
    return replace(config, run=replace(config.run, storage=uri))


def find_card(run: Location) -> Card | None:
    """run.json of the run in this folder; None: there is none yet."""
    with as_user_error(f"cannot read {run.child(CARD).uri}"):
        return read_card(run) if run.child(CARD).exists() else None


def check_writable(config: Config) -> None:
    """Raise UserError if run.storage cannot be written: a file is written there and removed.

    If it is a folder that does not exist yet, that is done in the nearest folder above it which does.
    """
    location = storage.resolve(config.run.storage)
    with as_user_error(f"cannot write to run.storage {location.uri}"):
        if location.is_local:
            path = Path(location.path)
            nearest = next(folder for folder in (path, *path.parents) if folder.exists())
            location = storage.resolve(str(nearest))
        file = shared_file(location.child(WRITE_CHECK))  # other processes may do the same
        file.replace(file.read(), b"\n")
    with contextlib.suppress(OSError):  # a bucket may allow writing and not removing
        file.replace(file.read(), None)


def open_run(name: str, uri: str, facts: Facts | None = None) -> RunFolder:
    """The run `name` in the folder or bucket `uri`; a new run gets a key, and a run.json with `facts`.

    Several processes may open one new run at once: the first writes run.json.
    """
    _check_name(name)
    location = storage.resolve(uri).child(name)
    with as_user_error(f"cannot write to run.storage {uri}"):
        card = find_card(location)
        if card is not None:
            return RunFolder(name, location, card.run_key)
        key = uuid.uuid4().hex
        now_ms = int(time.time() * 1000)
        given = {} if facts is None else vars(facts)
        card = Card(**given, name=name, run_key=key, created_ms=now_ms)
        text = (json.dumps(asdict(card), indent=2) + "\n").encode()
        if not location.child(CARD).create(text, durable=True):
            key = read_card(location).run_key
    return RunFolder(name, location, key)


def existing_run(uri: str) -> RunFolder:
    """The run in the folder or bucket `uri`."""
    location = storage.resolve(uri)
    card = find_card(location)
    if card is None:
        raise UserError(
            f"{uri} is not a run's folder: it has no run.json; expected {{run.storage}}/{{run.name}}"
        )
    return RunFolder(Path(location.path).name, location, card.run_key)


def folder_of(checkpoint_uri: str, run_key: str) -> Location | None:
    """The folder of the run with this key, if the checkpoint lies in it."""
    with contextlib.suppress(UserError):  # not a run's folder
        run = existing_run(checkpoint_uri.rstrip("/").rpartition("/")[0])
        return run.location if run.key == run_key else None
    return None


def read_card(run: Location) -> Card:
    """Read run.json of the run in this folder."""
    file = run.child(CARD)
    return strict_json.parse(Card, file.read(), f"{file.uri} is damaged", extra="ignore")


def status_json(status: Status) -> bytes:
    """The content of status.json."""
    return (json.dumps(asdict(status), indent=2) + "\n").encode()


def read_status(run: Location) -> Status | None:
    """Read status.json of the run in this folder; None: training has not begun."""
    file = run.child(STATUS)
    try:
        return strict_json.parse(Status, file.read(), f"{file.uri} is damaged")
    except FileNotFoundError:
        return None


def write_status(run: Location, status: Status) -> None:
    """Write status.json of the run in this folder."""
    run.child(STATUS).write(status_json(status))


def replace_status(run: Location, change: Callable[[Status | None], Status | None]) -> None:
    """Replace status.json by `change` of it, unless that is None; by compare-and-swap.

    `change` gets None if there is no status.json, or if it is damaged. It may be called several times.
    """
    file = shared_file(run.child(STATUS))
    while True:
        version = file.read()
        before = None
        if version is not None:
            with contextlib.suppress(UserError):
                before = strict_json.parse(Status, version.data, "")
        after = change(before)
        if after is None or file.replace(version, status_json(after)):
            return


def pictures(run: Location, series: str) -> dict[int, Location]:
    """The pictures of the series SAMPLES or DENOISING by images_seen, ascending."""
    folder = run.child(series)
    found = dict[int, Location]()
    for name in folder.files():
        match = PICTURE.fullmatch(name)
        if match is not None:
            found[int(match["images_seen"])] = folder.child(name)
    return found


def checkpoints(run: Location, found: Generations | None = None) -> list[Location]:
    """Complete checkpoints in a run's folder that count, oldest first.

    Args:
        found: generations.json of the run, if it has been read.
    """
    named = checkpoint_names(run)
    found = found or generations.read(run)
    children = [run.child(str(name)) for name in named if name.counts(found)]
    return [child for child in children if child.child(CHECKSUMS).exists()]


def checkpoint_names(run: Location, prefix: str = PREFIX) -> list[CheckpointName]:
    """The checkpoints in a run's folder, oldest first, complete or not, whether they count or not."""
    named = [CheckpointName.parse(name) for name in run.folders()]
    return sorted(name for name in named if name is not None and name.prefix == prefix)


def _check_name(name: str) -> None:
    is_plain = name.isprintable() and name == name.strip() and "/" not in name and "\\" not in name
    if not is_plain or name in ("", ".", "..", RESERVED):
        raise UserError(f"run.name {name!r} cannot be a folder's name; use letters, digits, '-' and '_'")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise UserError(
            f"run.name has {len(name.encode())} bytes; at most {MAX_NAME_BYTES} are allowed: {name}"
        )
