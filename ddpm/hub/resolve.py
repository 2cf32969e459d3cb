"""Which checkpoint a name means: a checkpoint's folder, a run's, or a model of MLflow's registry."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ddpm.checkpoints import checkpoint
from ddpm.checkpoints.runs import X_0_ERROR, X_0_ERROR_FORMAT, checkpoints
from ddpm.hub import registry
from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError


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
