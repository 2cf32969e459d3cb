"""A run's checkpoints in storage: written in the background, found again after a crash.

A checkpoint exists once its checksums.json does. All its other files, and the segment of records since the previous
checkpoint, are stored before. A worker killed at any moment, or a power cut, leaves the whole checkpoint or none: on a
disk everything is fsynced before the rename. A damaged checkpoint is skipped for the previous one.
"""

import contextlib
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from ddpm.checkpoints import checkpoint, runs
from ddpm.checkpoints.checkpoint import CHECKSUMS, Snapshot
from ddpm.config import Config
from ddpm.hub import resolve
from ddpm.storage.locations import Location
from ddpm.tracking import spool
from ddpm.tracking.metrics_buffer import segment_name
from ddpm.training.state import State
from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.retry import StorageError, retry_io

MAX_SNAPSHOTS = 2
"""Snapshots in memory: one being written, one waiting. Training waits if storage falls behind."""
FILE_TIMEOUT_S = 30.0
"""Time-out for what a run can do without, such as images and the removal of old checkpoints."""


class CheckpointManager:
    """Stores one run's checkpoints and files in a background thread; only rank 0 has one.

    Args:
        keep: number of newest checkpoints to keep, besides the best one.
        timeout_s: seconds that storage may fail before the run gives up.
        committed: called with the images_seen of each checkpoint that is stored.
        warn: called with one line about a failure that does not end the run.
    """

    def __init__(
        self,
        run: Location,
        keep: int,
        timeout_s: float,
        committed: Callable[[int], None],
        warn: Callable[[str], None],
    ) -> None:
        self._run, self._keep, self._timeout_s = run, keep, timeout_s
        self._committed, self._warn = committed, warn
        self._todo: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._room = threading.Semaphore(MAX_SNAPSHOTS)
        self._failure: BaseException | None = None
        threading.Thread(target=self._work, name="ddpm-checkpoints", daemon=True).start()

    def save(self, snapshot: Snapshot, segment: bytes | None, best: bool) -> None:
        """Store `snapshot`, and `segment`, the records since the last checkpoint; if `best`, also as the best one.

        Raises:
            StorageError: an earlier checkpoint could not be stored.
        """
        self._room.acquire()
        self.check()
        self._todo.put(partial(self._save, snapshot, segment, best))

    def publish(self, name: str, data: bytes) -> None:
        """Store a file that training can do without."""
        self._todo.put(partial(self._publish, name, data))

    def check(self) -> None:
        """Raise the error that made storing fail, if there was one."""
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Return when everything is stored.

        Raises:
            StorageError: a checkpoint could not be stored.
        """
        self._todo.join()
        self.check()

    def close(self) -> None:
        """End the thread once everything is stored; does not wait for it."""
        self._todo.put(None)

    # The methods below run in the thread.

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            try:
                if self._failure is None:
                    job()
            except BaseException as error:  # of any type: `check` raises it in the training thread
                self._failure = error
            self._todo.task_done()

    def _retry_io(self, call: Callable[[], None], where: Location, timeout_s: float | None = None) -> None:
        try:
            retry_io(call, where=where.uri, timeout_s=self._timeout_s if timeout_s is None else timeout_s)
        except FileNotFoundError as error:  # not retried; for a write it means that the folder is gone
            raise StorageError(f"{where.uri}: cannot write there: {error}") from None

    def _publish(self, name: str, data: bytes) -> None:
        where = self._run.child(name)
        try:
            self._retry_io(lambda: where.write(data), where, min(self._timeout_s, FILE_TIMEOUT_S))
        except StorageError as error:
            self._warn(str(error))

    def _save(self, snapshot: Snapshot, segment: bytes | None, best: bool) -> None:
        try:
            target = self._run.child(checkpoint.name_at(snapshot.images_seen))
            with _staging(target) as folder:
                self._retry_io(lambda: _write_fresh(snapshot, folder), target)
                if segment is not None:
                    where = self._run.child(spool.FOLDER).child(segment_name(snapshot.images_seen))
                    self._retry_io(lambda: where.write(segment, durable=True), where)
                if best:
                    name = checkpoint.name_at(snapshot.images_seen, checkpoint.BEST_PREFIX)
                    self._commit(folder, self._run.child(name), move=False)
                self._commit(folder, target, move=True)
        finally:
            self._room.release()
        self._committed(snapshot.images_seen)
        try:
            self._retry_io(self._retire, self._run, min(self._timeout_s, FILE_TIMEOUT_S))
        except StorageError as error:
            self._warn(f"an old checkpoint could not be removed: {error}")

    def _commit(self, folder: Path, target: Location, *, move: bool) -> None:
        """Move or copy the checkpoint in `folder` to `target`; an older one there is made invalid or removed first."""
        if target.is_local:
            place = Path(target.path)
            self._retry_io(lambda: _put_in_place(folder, place, move), target)
            self._retry_io(lambda: files.sync(place.parent), target)
            return
        self._retry_io(target.child(CHECKSUMS).unlink, target)
        names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
        with ThreadPoolExecutor(len(names)) as pool:  # in parallel: a request may take seconds
            list(pool.map(lambda name: self._upload(folder, target, name), names))
        self._upload(folder, target, CHECKSUMS)

    def _upload(self, folder: Path, target: Location, name: str) -> None:
        file = str(folder / name), target.child(name).path
        copy = partial(pafs.copy_files, *file, destination_filesystem=target.filesystem)
        self._retry_io(copy, target)

    def _retire(self) -> None:
        """Remove checkpoints that are too old, or no longer the best."""
        names = self._run.folders()
        old = [name for name in names if name.startswith(checkpoint.PREFIX)][: -self._keep]
        worse = [name for name in names if name.startswith(checkpoint.BEST_PREFIX)][:-1]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: remove(self._run.child(name)), old + worse))


@contextmanager
def latest_valid(run: Location, timeout_s: float, warn: Callable[[str], None]) -> Iterator[Path | None]:
    """The newest valid checkpoint as a local folder; None: there is none yet.

    Raises:
        UserError: all checkpoints are damaged.
        StorageError: storage does not answer.
    """
    found = retry_io(lambda: runs.checkpoints(run), where=run.uri, timeout_s=timeout_s)
    for location in reversed(found):
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(resolve.as_folder(location, timeout_s))
                checkpoint.verify(folder)
            except StorageError:
                raise
            except (UserError, FileNotFoundError) as error:
                warn(f"checkpoint {location.uri} is not valid, so the one before it is tried: {error}")
                continue
            yield folder
            return
    if found:
        raise UserError(
            f"every checkpoint of {run.uri} is damaged, so the run cannot be resumed; restore one from a backup, or "
            "use another --run.name"
        )
    yield None


def begin(run: Location, config: Config, identity: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Store the averaged weights of config.train.init_from as the run's first checkpoint, at 0 images.

    The run then resumes like any other; the source checkpoint is not needed again.

    Args:
        identity: the run's identity, stored in state.json.

    Raises:
        UserError: there is no such checkpoint, or it holds another net.
        StorageError: the first checkpoint cannot be stored.
    """
    assert config.train.init_from is not None, "asked for"
    state = State.create(config, torch.device("cpu"))
    with resolve.local_checkpoint(config.train.init_from) as folder:
        state.init_from(folder, config)
    first = CheckpointManager(
        run, config.train.keep_checkpoints, config.run.storage_timeout_s, lambda seen: None, warn
    )
    first.save(state.snapshot(config, identity), None, best=False)
    first.flush()
    first.close()


def clean_up(run: Location) -> None:
    """Remove incomplete files and checkpoints that a killed worker left."""
    run.sweep()
    run.child(spool.FOLDER).sweep()
    prefixes = checkpoint.PREFIX, checkpoint.BEST_PREFIX
    for name in run.folders():
        is_temporary = name.startswith(tuple(f".{prefix}" for prefix in prefixes))
        if is_temporary or (name.startswith(prefixes) and not run.child(name).child(CHECKSUMS).exists()):
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


def _put_in_place(folder: Path, place: Path, move: bool) -> None:
    if move:
        files.put_in_place(folder, place)
        return
    copy = files.temporary(place)
    try:
        shutil.copytree(folder, copy)
        files.sync_tree(copy)
        files.put_in_place(copy, place)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
