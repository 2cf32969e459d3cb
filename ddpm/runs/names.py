"""Resolution of a name to a checkpoint: a folder of one or of a run, a model in MLflow's registry, or builtin:NAME.

Built-in nets, made by infra/builtin_nets.py, are averaged weights of a preset's run. They are kept in float16, half the
size, beside the config.json and state.json of a checkpoint and the model card.
"""

import pkgutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs
import torch

from ddpm.build import TrainedNet, build_net
from ddpm.runs import checkpoint, run_folder, storage
from ddpm.runs.run_folder import CheckpointName
from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError
from ddpm.utils.files import MAX_BYTES
from ddpm.utils.retry import retry_io

NETS = Path(__file__).parent / "nets"
"""The folder of the built-in nets."""
BUILTIN = "builtin:"
MODELS = "models:/"
DOWNLOAD = "ddpm.tracking.registry:download"
"""The function that writes a registered model into a folder. It is imported when it is used: a run has a name without
MLflow, too."""
SCHEMES = (BUILTIN, MODELS)
"""Beginnings of the URIs of checkpoints that are not in a folder or bucket."""


def checkpoints_of(uri: str) -> list[str]:
    """`uri` itself, if it is a checkpoint or has a scheme of SCHEMES; else the checkpoints of the run, oldest first."""
    if uri.startswith(SCHEMES):
        return [uri]
    return [location.uri for location in _checkpoints_at(storage.resolve(uri), uri)]


def name_of(uri: str) -> str:
    """The name of a run or a registered or built-in net, as a folder's name; for a checkpoint, that of its run."""
    if uri.startswith(SCHEMES):
        return uri.removeprefix(MODELS).strip("/").replace("/", "-").replace(":", "-")
    path = Path(storage.resolve(uri).path)
    is_checkpoint = CheckpointName.parse(path.name) is not None
    return path.parent.name if is_checkpoint else path.name


@contextmanager
def local_checkpoint(uri: str, timeout_s: float = 0.0) -> Iterator[Path]:
    """A context with the checkpoint at `uri` as a local folder; for a run its newest.

    A checkpoint in a bucket or with a scheme of SCHEMES is written to a temporary folder. Calls for its files are
    retried for `timeout_s`.
    """
    if uri.startswith(SCHEMES):
        write = _unpack if uri.startswith(BUILTIN) else pkgutil.resolve_name(DOWNLOAD)
        with tempfile.TemporaryDirectory(prefix="ddpm-checkpoint-") as folder:
            yield write(uri, Path(folder))
        return
    location = storage.resolve(uri)
    newest = retry_io(lambda: _checkpoints_at(location, uri)[-1], where=uri, timeout_s=timeout_s)
    with as_folder(newest, timeout_s) as local:
        yield local


@contextmanager
def as_folder(location: Location, timeout_s: float = 0.0) -> Iterator[Path]:
    """A context with the checkpoint at `location` as a local folder of the same name, downloaded if need be."""
    if location.is_local:
        yield Path(location.path)
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-checkpoint-") as folder:
        local = Path(folder, Path(location.path).name)
        local.mkdir()

        def fetch(name: str) -> None:
            copy = partial(
                pafs.copy_files,
                location.child(name).path,
                str(local / name),
                source_filesystem=location.filesystem,
                destination_filesystem=pafs.LocalFileSystem(),
                chunk_size=MAX_BYTES,  # in few requests
            )
            retry_io(copy, where=location.uri, timeout_s=timeout_s)

        names = retry_io(location.files, where=location.uri, timeout_s=timeout_s)
        with ThreadPoolExecutor(len(checkpoint.FILES)) as pool:  # in parallel: a request may take seconds
            list(pool.map(fetch, names))
        yield local


def builtin_folder(uri: str) -> Path:
    """The package's folder of the built-in net `uri`."""
    known = {f"{BUILTIN}{file.parent.name}": file.parent for file in NETS.glob("*/net.safetensors")}
    if uri not in known:
        raise UserError(f"there is no net {uri}; the package has {' and '.join(sorted(known))}")
    return known[uri]


def _unpack(uri: str, folder: Path) -> Path:
    """Write the net `uri` into `folder` as a checkpoint without a run, in float32; returns the checkpoint's folder."""
    packed = builtin_folder(uri)
    out = folder / uri.removeprefix(BUILTIN)
    config = checkpoint.read_config(packed)
    net = build_net(config)
    tensors = checkpoint.read_tensors(packed / "net.safetensors", torch.device("cpu"))
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    checkpoint.write_net(TrainedNet(net, config), checkpoint.read_state(packed), out)
    return out


def _checkpoints_at(location: Location, uri: str) -> list[Location]:
    """The checkpoint at `location`, which was given as `uri`, or the checkpoints of the run there, oldest first."""
    if not location.exists():
        raise UserError(f"{uri} does not exist; expected a checkpoint folder or a run folder")
    if location.child(run_folder.CHECKSUMS).exists():
        return [location]
    of_run = run_folder.checkpoints(location)
    if of_run:
        return of_run
    raise UserError(f"{uri} holds no checkpoint: neither checksums.json nor a {run_folder.PREFIX}* folder")
