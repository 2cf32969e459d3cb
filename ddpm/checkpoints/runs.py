"""A run's folder: its name, its key, and its checkpoints."""

import contextlib
import json
import re
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from ddpm.config import Config
from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error

PREFIX = "checkpoint-"
"""What the name of a checkpoint's folder begins with; images_seen follows."""
CHECKSUMS = "checksums.json"
"""File of a checkpoint that is written last: a folder without it is not one."""
EVALUATIONS = "evaluations"
"""Folder of a run with the results of jobs/evaluate.py."""
StatusName = Literal["RUNNING", "FINISHED", "STOPPED", "FAILED"]
STATUS = "status.json"
"""File of a run that says how it stands."""
MAX_NAME_BYTES = 240
"""A folder's name has at most 255 bytes on most disks, and MLflow's name of a run 250."""
RESERVED = "data"
"""Folder beside the runs that holds prepared sources."""


@dataclass(frozen=True)
class Run:
    """One logical run, however often it is restarted."""

    name: str
    location: Location
    key: str
    """Random, created once; identifies the run in MLflow."""


@dataclass(frozen=True)
class _Card:
    """The part of run.json that is read back."""

    run_key: str


@dataclass(frozen=True)
class Status:
    """Content of status.json: how a run stands. Rank 0 writes it while training, and the driver at the end."""

    status: StatusName
    """RUNNING also after the driver was killed."""
    images_seen: Annotated[int, Ge(0)]
    """Where training was; the newest checkpoint may be earlier."""
    images_lost: Annotated[int, Ge(0)]
    """Images trained on in vain, since a crash took them back."""
    minutes: Annotated[float, Ge(0)]
    """Time of training, of all starts together."""
    tags: dict[str, str]
    """Preset, changes, versions, command and hardware, as in MLflow."""


def with_name_and_storage(config: Config, preset: str) -> Config:
    """`config` with a run name (default: preset and time) and an absolute storage URI."""
    name = config.run.name or f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    _check_name(name)
    uri = locations.resolve(config.run.storage).uri
    return replace(config, run=replace(config.run, name=name, storage=uri))


def open_run(name: str, uri: str) -> Run:
    """The run `name` in the folder or bucket `uri`; a new run gets its key."""
    _check_name(name)
    location = locations.resolve(uri).child(name)
    card = location.child("run.json")
    with as_user_error(f"cannot write to run.storage {uri}"):
        if card.exists():
            return Run(name, location, _read_key(card))
        key = uuid.uuid4().hex
        card.write((json.dumps({"name": name, "run_key": key}, indent=2) + "\n").encode(), durable=True)
    return Run(name, location, key)


def existing_run(uri: str) -> Run:
    """The run in the folder or bucket `uri`."""
    location = locations.resolve(uri)
    card = location.child("run.json")
    with as_user_error(f"cannot read {card.uri}"):
        key = _read_key(card) if card.exists() else None
    if key is None:
        raise UserError(
            f"{uri} is not a run's folder: it has no run.json; expected {{run.storage}}/{{run.name}}"
        )
    return Run(Path(location.path).name, location, key)


def folder_of(checkpoint_uri: str, run_key: str) -> Location | None:
    """The folder of the run with this key, if the checkpoint lies in it."""
    with contextlib.suppress(UserError):  # not a run's folder
        run = existing_run(checkpoint_uri.rstrip("/").rpartition("/")[0])
        return run.location if run.key == run_key else None
    return None


def _read_key(card: Location) -> str:
    return strict_json.parse(_Card, card.read(), f"{card.uri} is damaged", extra="ignore").run_key


def status_json(status: Status) -> bytes:
    """The content of status.json."""
    return (json.dumps(asdict(status), indent=2) + "\n").encode()


def read_status(run: Location) -> Status | None:
    """Read status.json of the run in this folder; None: training has not begun."""
    file = run.child(STATUS)
    return strict_json.parse(Status, file.read(), f"{file.uri} is damaged") if file.exists() else None


def checkpoints(location: Location) -> list[Location]:
    """Complete checkpoints in a run's folder, oldest first."""
    children = map(location.child, checkpoint_names(location))
    return [child for child in children if child.child(CHECKSUMS).exists()]


def checkpoint_names(location: Location, prefix: str = PREFIX) -> list[str]:
    """Names of the checkpoints in a run's folder, complete or not, oldest first; a user's copies have other names."""
    return [name for name in location.folders() if re.fullmatch(rf"{prefix}\d+", name)]


def _check_name(name: str) -> None:
    is_plain = name.isprintable() and name == name.strip() and "/" not in name and "\\" not in name
    if not is_plain or name in ("", ".", "..", RESERVED):
        raise UserError(f"run.name {name!r} cannot be a folder's name; use letters, digits, '-' and '_'")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise UserError(
            f"run.name has {len(name.encode())} bytes; at most {MAX_NAME_BYTES} are allowed: {name}"
        )
