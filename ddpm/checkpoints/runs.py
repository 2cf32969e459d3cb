"""A run's folder: its name, its key, and its checkpoints.

Its own room because the driver, the jobs that draw and those that judge all ask the same questions of it.
"""

import contextlib
import json
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ddpm.checkpoints import checkpoint
from ddpm.config import Config
from ddpm.hub import registry
from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError

X_0_ERROR, X_0_ERROR_FORMAT = "x_0_error.json", "ddpm-x_0-error/1"
"""File of a checkpoint: the errors of its averaged net on training images, once it has been judged."""
RESERVED = "data"
"""Folder beside the runs that holds prepared sources."""


@dataclass(frozen=True)
class Run:
    """One logical run, however often it is restarted."""

    name: str
    location: Location
    key: str
    """Random, made once: names the run in MLflow."""


class X0Error(BaseModel):
    """What x_0_error.json holds."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    format: Literal["ddpm-x_0-error/1"]
    weights_sha256: str
    x_0_error: list[Annotated[float, Field(ge=0)]]


def settled(config: Config, preset: str) -> Config:
    """`config` with a run name (if it has none: preset and time) and an absolute storage URI.

    Raises:
        UserError: not a name for a folder, or storage that cannot be reached.
    """
    name = config.run.name or f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    _check_name(name)
    uri = locations.resolve(config.run.storage).uri
    return replace(config, run=replace(config.run, name=name, storage=uri))


def open_run(name: str, uri: str) -> Run:
    """The run `name` in the folder or bucket `uri`; a new one gets its key.

    Raises:
        UserError: not a name for a folder, or storage refuses.
    """
    _check_name(name)
    location = locations.resolve(uri).child(name)
    card = location.child("run.json")
    try:
        if card.exists():
            return Run(name, location, _read_key(card))
        key = uuid.uuid4().hex
        card.write((json.dumps({"name": name, "run_key": key}, indent=2) + "\n").encode(), durable=True)
    except OSError as error:
        raise UserError(f"cannot write to run.storage {uri}: {error}") from None
    return Run(name, location, key)


def existing_run(uri: str) -> Run:
    """The run in the folder or bucket `uri`.

    Raises:
        UserError: there is none, or storage refuses.
    """
    location = locations.resolve(uri)
    card = location.child("run.json")
    try:
        if not card.exists():
            raise UserError(
                f"{uri} is no run's folder: it has no run.json; expected {{run.storage}}/{{run.name}}"
            )
        return Run(Path(location.path).name, location, _read_key(card))
    except OSError as error:
        raise UserError(f"cannot read {card.uri}: {error}") from None


def _read_key(card: Location) -> str:
    try:
        key = json.loads(card.read())["run_key"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{card.uri} is damaged: {error!r}") from None
    if not isinstance(key, str) or not key.isalnum():
        raise UserError(f"{card.uri} is damaged: run_key is {key!r}")
    return key


def checkpoints(location: Location) -> list[Location]:
    """Complete checkpoints in a run's folder, oldest first."""
    names = [name for name in location.folders() if name.startswith(checkpoint.PREFIX)]
    return [child for child in map(location.child, names) if child.child("checksums.json").exists()]


def checkpoints_of(uri: str) -> list[str]:
    """Itself, where `uri` is a checkpoint or a registered model; of a run its checkpoints, oldest first.

    Raises:
        UserError: there is none.
    """
    return [uri] if uri.startswith(registry.SCHEME) else [location.uri for location in _found(uri)]


@contextmanager
def local_checkpoint(uri: str) -> Iterator[Path]:
    """The checkpoint at `uri`, a checkpoint's or a run's folder or URI, or a registered model, as a local folder.

    Of a run it is the newest. What lies in a bucket, or in MLflow's registry (models:/NAME@ALIAS), is downloaded for
    as long as the context lasts.

    Raises:
        UserError: there is none.
    """
    if uri.startswith(registry.SCHEME):
        with tempfile.TemporaryDirectory(prefix="ddpm-checkpoint-") as folder:
            yield registry.download(uri, Path(folder))
        return
    location = _found(uri)[-1]
    if location.is_local:
        yield Path(location.path)
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-checkpoint-") as folder:
        yield location.download(Path(folder))


def keep_x_0_error(uri: str, weights_sha256: str, x_0_error: Tensor) -> None:
    """Keep what was measured with the averaged weights of the checkpoint at `uri` in its folder, if that can be."""
    if uri.startswith(registry.SCHEME):
        return
    place, errors = locations.resolve(uri), x_0_error.tolist()
    card = {"format": X_0_ERROR_FORMAT, "weights_sha256": weights_sha256, "x_0_error": errors}
    with contextlib.suppress(OSError):
        if place.child(checkpoint.CHECKSUMS).exists():  # a run that goes on deletes its old checkpoints
            place.child(X_0_ERROR).write((json.dumps(card) + "\n").encode())


def read_x_0_error(folder: Path, num_timesteps: int) -> Tensor:
    """[T] float64, the mean squared error of x_0_hat at every t, as `keep_x_0_error` left it in a checkpoint's folder.

    Raises:
        UserError: there is none, or it is damaged or of other weights.
    """
    file = folder / X_0_ERROR
    weights = checkpoint.read_checksums(folder)["ema.safetensors"]
    try:
        card = X0Error.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {X_0_ERROR}, which --variance measured takes; jobs/evaluate.py leaves it there"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    except ValidationError as error:
        raise UserError(f"{checkpoint.damaged(file, error)}; jobs/evaluate.py makes it again") from None
    if card.weights_sha256 != weights or len(card.x_0_error) != num_timesteps:
        raise UserError(
            f"{file} is of other weights or another num_timesteps; jobs/evaluate.py makes it again"
        )
    return torch.tensor(card.x_0_error, dtype=torch.float64)


def _found(uri: str) -> list[Location]:
    """The checkpoint at `uri`, or the checkpoints of the run there, oldest first; at least one."""
    location = locations.resolve(uri)
    if not location.exists():
        raise UserError(f"{uri} does not exist; expected a checkpoint folder or a run folder")
    if location.child("checksums.json").exists():
        return [location]
    found = checkpoints(location)
    if not found:
        raise UserError(
            f"{uri} holds no checkpoint: neither checksums.json nor a {checkpoint.PREFIX}* folder"
        )
    return found


def _check_name(name: str) -> None:
    is_plain = name.isprintable() and name == name.strip() and "/" not in name and "\\" not in name
    if not is_plain or name in ("", ".", "..", RESERVED):
        raise UserError(f"run.name {name!r} cannot be a folder's name; use letters, digits, '-' and '_'")
