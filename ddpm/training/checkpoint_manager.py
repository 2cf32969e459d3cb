"""A run's checkpoints in storage: stored whole, and found again after a crash.

A checkpoint exists once its checksums.json does; all its other files are stored before. A writer killed at any moment,
or a power cut, leaves the whole checkpoint or none: on a disk everything is fsynced before the rename. A damaged
checkpoint is skipped for the previous one. No checkpoint is ever replaced: its name has the number of the generation
that stored it (runs/generations.py).
"""

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs
import torch

from ddpm.config.tree import Config
from ddpm.runs import checkpoint, curves, generations, names, run_folder
from ddpm.runs.checkpoint import Snapshot
from ddpm.runs.generations import Generations
from ddpm.runs.run_folder import BEST_PREFIX, CHECKSUMS, PREFIX, CheckpointName, RunFolder
from ddpm.runs.storage import Location
from ddpm.training.state import State
from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.retry import StorageError, retry_io

T = TypeVar("T")
Retry = Callable[[Callable[[], Any], Location], Any]
"""`retry_in_folder(call, where)`, with a time-out and warnings."""


def retry_in_folder(
    call: Callable[[], T], where: Location, timeout_s: float, warn: Callable[[str], object]
) -> T:
    """`retry_io` of a call that needs the run's folder: a missing file means that the folder is gone."""
    try:
        return retry_io(call, where=where.uri, timeout_s=timeout_s, warn=warn)
    except FileNotFoundError as error:
        raise StorageError(f"{where.uri}: cannot write there: {error}") from None


def store(snapshot: Snapshot, run: Location, generation: int, best: bool, retry: Retry) -> None:
    """Store a checkpoint of this generation; if `best`, also as the best one."""
    name = CheckpointName(snapshot.images_seen, generation)
    target = run.child(str(name))
    with _staging(target) as folder:
        retry(lambda: _write_fresh(snapshot, folder), target)
        if best:
            _commit(folder, run.child(str(name._replace(prefix=BEST_PREFIX))), retry, move=False)
        _commit(folder, target, retry, move=True)


def _commit(folder: Path, target: Location, retry: Retry, *, move: bool) -> None:
    """Move or copy the checkpoint in `folder` to `target`, which does not exist."""
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

    parts = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
    with ThreadPoolExecutor(len(parts)) as pool:  # in parallel: a request may take seconds
        list(pool.map(upload, parts))
    checksums = (folder / CHECKSUMS).read_bytes()
    retry(lambda: target.child(CHECKSUMS).create(checksums), target)


def retire(run: Location, generation: int) -> None:
    """Remove checkpoints that do not count any more, and those that are no longer the best.

    Those of newer generations than this writer's stay.
    """
    found = generations.read(run)
    old = [name for name in run_folder.checkpoint_names(run) if not name.counts(found)]
    worse = run_folder.checkpoint_names(run, BEST_PREFIX)[:-1]
    removed = [name for name in old + worse if name.generation <= generation]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: remove(run.child(str(name))), removed))


@contextmanager
def latest_valid(
    run: RunFolder, found: Generations, timeout_s: float, warn: Callable[[str], object]
) -> Iterator[Path | None]:
    """The newest valid checkpoint as a local folder; None: there is none yet.

    Args:
        found: generations.json of the run.
    """
    uri = run.location.uri
    stored = retry_io(lambda: run_folder.checkpoints(run.location, found), where=uri, timeout_s=timeout_s)
    for location in reversed(stored):
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(names.as_folder(location, timeout_s))
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
    driver: str,
    config: Config,
    data_fingerprint: str,
    warn: Callable[[str], object],
    class_names: Sequence[str] = (),
) -> None:
    """Store the averaged weights of config.train.init_from as the run's first checkpoint, at 0 images.

    The run then resumes like any other; the source checkpoint is not needed again.

    Args:
        driver: id of the driver's lock, which has claimed the run.
    """
    assert config.train.init_from is not None, "the caller checks it"
    state = State.create(config, torch.device("cpu"))
    with names.local_checkpoint(config.train.init_from, config.run.storage_timeout_s) as folder:
        state.init_from(folder, config)
    identity = checkpoint.identity(config, run.key, data_fingerprint, class_names)
    retry = partial(retry_in_folder, timeout_s=config.run.storage_timeout_s, warn=warn)
    writer = generations.Writer(run.location, driver, uuid.uuid4().hex)
    while not retry(lambda: writer.begin(writer.read(), 0, 0), run.location):
        pass
    store(state.snapshot(config, identity), run.location, writer.generation, best=False, retry=retry)


def clean_up(run: Location, generation: int) -> None:
    """Remove incomplete files and checkpoints that killed workers of older generations left."""
    run.sweep()
    run.child(curves.FOLDER).sweep()
    for prefix in (PREFIX, BEST_PREFIX):
        for name in run_folder.checkpoint_names(run, prefix):
            is_complete = run.child(str(name)).child(CHECKSUMS).exists()
            if name.generation < generation and not is_complete:
                remove(run.child(str(name)))
    for staged in run.folders():
        named = CheckpointName.parse(staged.removeprefix(".").partition(".")[0])
        if staged.startswith(".") and named is not None and named.generation < generation:
            run.child(staged).delete()


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
        folder.rename(target)  # fails if there is a checkpoint
        return
    copy = files.temporary(target)
    try:
        shutil.copytree(folder, copy)
        files.sync_tree(copy)
        copy.rename(target)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
