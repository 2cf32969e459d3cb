"""A run's checkpoints in storage: stored whole, and found again after a crash.

A checkpoint exists once its checksums.json does; all its other files are stored before. A writer killed at any moment,
or a power cut, leaves the whole checkpoint or none: on a disk everything is fsynced before the rename. A damaged
checkpoint is skipped for the previous one.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow.fs as pafs
import torch

from ddpm.config.tree import Config
from ddpm.runs import checkpoint, curves, run_folder
from ddpm.runs.checkpoint import CHECKSUMS, Snapshot
from ddpm.runs.run_folder import RunFolder
from ddpm.runs.storage import Location
from ddpm.tracking import names as resolve
from ddpm.training.state import State
from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.retry import StorageError, retry_io

T = TypeVar("T")
Retry = Callable[[Callable[[], None], Location], None]
"""`retry_in_folder(call, where)`, with a time-out and warnings."""


def retry_in_folder(
    call: Callable[[], T], where: Location, timeout_s: float, warn: Callable[[str], object]
) -> T:
    """`retry_io` of a call that needs the run's folder: a missing file means that the folder is gone."""
    try:
        return retry_io(call, where=where.uri, timeout_s=timeout_s, warn=warn)
    except FileNotFoundError as error:
        raise StorageError(f"{where.uri}: cannot write there: {error}") from None


def store(snapshot: Snapshot, run: Location, before: Mapping[str, bytes], best: bool, retry: Retry) -> None:
    """Store a checkpoint; if `best`, also as the best one.

    Args:
        before: files of the run that are stored before the checkpoint is valid, by name.
    """
    target = run.child(checkpoint.name_at(snapshot.images_seen))
    with _staging(target) as folder:
        retry(lambda: _write_fresh(snapshot, folder), target)
        for name, data in before.items():
            file = run.child(name)
            retry(partial(file.write, data, durable=True), file)
        if best:
            name = checkpoint.name_at(snapshot.images_seen, checkpoint.BEST_PREFIX)
            _commit(folder, run.child(name), retry, move=False)
        _commit(folder, target, retry, move=True)


def _commit(folder: Path, target: Location, retry: Retry, *, move: bool) -> None:
    """Move or copy the checkpoint in `folder` to `target`; an older one there is made invalid or removed first."""
    if target.is_local:
        path = Path(target.path)
        retry(lambda: _put_in_place(folder, path, move), target)
        retry(lambda: files.sync(path.parent), target)
        return

    def upload(name: str) -> None:
        source = str(folder / name)
        destination = target.child(name).path
        copy = partial(pafs.copy_files, source, destination, destination_filesystem=target.filesystem)
        retry(copy, target)

    retry(target.child(CHECKSUMS).unlink, target)
    names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
    with ThreadPoolExecutor(len(names)) as pool:  # in parallel: a request may take seconds
        list(pool.map(upload, names))
    upload(CHECKSUMS)


def retire(run: Location, keep: int) -> None:
    """Remove checkpoints other than the newest `keep`, and those that are no longer the best."""
    old = run_folder.checkpoint_names(run)[:-keep]
    worse = run_folder.checkpoint_names(run, checkpoint.BEST_PREFIX)[:-1]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: remove(run.child(name)), old + worse))


@contextmanager
def latest_valid(run: RunFolder, timeout_s: float, warn: Callable[[str], object]) -> Iterator[Path | None]:
    """The newest valid checkpoint as a local folder; None: there is none yet."""
    uri = run.location.uri
    stored = retry_io(lambda: run_folder.checkpoints(run.location), where=uri, timeout_s=timeout_s)
    for location in reversed(stored):
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(resolve.as_folder(location, timeout_s))
                checkpoint.verify(folder)
                checkpoint.check_belongs(folder, run.key)
            except StorageError:
                raise
            except (UserError, FileNotFoundError) as error:
                warn(f"checkpoint {location.uri} is not valid, so the one before it is tried: {error}")
                continue
            yield folder
            return
    if stored:
        raise UserError(
            f"every checkpoint of {uri} is damaged, so the run cannot be resumed; restore one from a backup, or "
            "use another --run.name"
        )
    yield None


def begin(
    run: RunFolder,
    config: Config,
    data_fingerprint: str,
    warn: Callable[[str], object],
    class_names: Sequence[str] = (),
) -> None:
    """Store the averaged weights of config.train.init_from as the run's first checkpoint, at 0 images.

    The run then resumes like any other; the source checkpoint is not needed again.
    """
    assert config.train.init_from is not None, "asked for"
    state = State.create(config, torch.device("cpu"))
    with resolve.local_checkpoint(config.train.init_from, config.run.storage_timeout_s) as folder:
        state.init_from(folder, config)
    identity = checkpoint.identity(config, run.key, data_fingerprint, class_names)
    write = partial(retry_in_folder, timeout_s=config.run.storage_timeout_s, warn=warn)
    store(state.snapshot(config, identity), run.location, before={}, best=False, retry=write)


def clean_up(run: Location) -> None:
    """Remove incomplete files and checkpoints that a killed worker left."""
    run.sweep()
    run.child(curves.FOLDER).sweep()
    for prefix in (checkpoint.PREFIX, checkpoint.BEST_PREFIX):
        named = run_folder.checkpoint_names(run, prefix)
        incomplete = [name for name in named if not run.child(name).child(CHECKSUMS).exists()]
        staged = [name for name in run.folders() if name.startswith(f".{prefix}")]
        for name in incomplete + staged:
            remove(run.child(name))


def remove(location: Location) -> None:
    """Delete a checkpoint, its checksums first, so that it is never valid with files missing."""
    location.child(CHECKSUMS).unlink()
    location.delete()


@contextmanager
def _staging(target: Location) -> Iterator[Path]:
    """The folder in which a checkpoint is built: on a disk next to `target`, for a rename; else a temporary one."""
    if target.is_local:
        staged = files.temporary(Path(target.path))
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-checkpoint-") as folder:
        yield Path(folder, "checkpoint")


def _write_fresh(snapshot: Snapshot, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint.write(snapshot, folder)


def _put_in_place(folder: Path, target: Path, move: bool) -> None:
    if move:
        files.put_in_place(folder, target)
        return
    copy = files.temporary(target)
    try:
        shutil.copytree(folder, copy)
        files.sync_tree(copy)
        files.put_in_place(copy, target)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
