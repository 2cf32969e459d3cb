"""A run's store, one object on rank 0: checkpoints, curves, pictures and status of one run's folder.

Everything is written in the background, in order. A checkpoint exists once its checksums.json does. All its other
files, and the curves since the previous checkpoint, are stored before. A worker killed at any moment, or a power cut,
leaves the whole checkpoint or none (checkpoint_manager.py). A worker that wakes up after others have taken over the run
writes nothing that counts, and ends with Superseded (runs/generations.py).

What is recorded is final. A run that resumes from an earlier checkpoint measures again what was measured before: the
same values, at other times. They are not recorded again.
"""

import contextlib
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from ddpm.config.tree import Config
from ddpm.runs import checkpoint, curves, run_folder
from ddpm.runs.checkpoint import Snapshot
from ddpm.runs.curves import CurveRow
from ddpm.runs.generations import Writer
from ddpm.runs.run_folder import CheckpointName, RunFolder, RunStatus, Status
from ddpm.runs.storage import Location
from ddpm.training import checkpoint_manager, run_state
from ddpm.training.state import State
from ddpm.utils.errors import UserError
from ddpm.utils.images import Pixels, png_bytes
from ddpm.utils.progress import Progress
from ddpm.utils.retry import StorageError, retry_io

MAX_SNAPSHOTS = 2
"""Snapshots in memory: one being written, one waiting. Training waits if storage falls behind."""
ROOM_POLL_S = 1.0
FILE_TIMEOUT_S = 30.0
"""Time-out for what a run can do without, such as images and the removal of old checkpoints."""
STATUS_INTERVAL_S = 10.0
"""Interval at which status.json is written; a restart counts the lost images from it."""

T = TypeVar("T")


class RunStore:
    """The folder of a run.

    Args:
        data_fingerprint: of the data set, for state.json.
        driver: id of the lock of the driver that has claimed the run; None: this store claims it.
        notify: called with subjects of run_state.py and their values: WARNINGS, METRICS, PROGRESS, COMMITTED.
        hardware: of this worker, for status.json.
        class_names: of the data set, for state.json.

    Attributes:
        last_progress: how far training is.
        newest: name of the newest stored checkpoint.
        warn: called with a line for the user.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        data_fingerprint: str,
        notify: Callable[[str, Any], object] = lambda subject, value: None,
        hardware: str = "",
        class_names: Sequence[str] = (),
        driver: str | None = None,
    ) -> None:
        self.last_progress: Progress | None = None
        self.newest = ""
        self._config = config
        self._run = run
        self._location = run.location
        self._notify = notify
        self._identity = checkpoint.identity(config, run.key, data_fingerprint, class_names)
        self._timeout_s = config.run.storage_timeout_s
        self._hardware = hardware
        self.warn = partial(notify, run_state.WARNINGS)
        self._images_seen = 0
        self._images_lost = 0
        self._began_at = time.monotonic()
        self._minutes_before = 0.0
        self._status_at = -math.inf
        self._rows: list[CurveRow] = []
        """Points since the last checkpoint."""
        self._next_row: int | None = None
        """Number of the first of them; None: the recorded ones are not read yet."""
        self._recorded: set[tuple[str, int]] = set()
        """Points beyond the checkpoint that the run resumed from: name and images_seen."""
        own_id = uuid.uuid4().hex
        self._has_driver = driver is not None
        self._writer = Writer(run.location, driver or own_id, own_id)
        self._stored: list[int] = []
        """images_seen of the checkpoints, ascending."""
        self._todo: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._room = threading.Semaphore(MAX_SNAPSHOTS)
        self._failure: BaseException | None = None
        threading.Thread(target=self._run_jobs, name="ddpm-store", daemon=True).start()

    @contextmanager
    def latest_checkpoint(self, reached: int = 0) -> Iterator[Path | None]:
        """The newest valid checkpoint, from which the run continues; unfinished files are removed.

        Args:
            reached: images_seen that training is known to have reached; those beyond the checkpoint are lost.
        """
        run = self._location
        with ExitStack() as stack:
            folder = self._begin_generation(stack)
            at = checkpoint.images_seen_at(folder)
            self._images_seen = at
            self._retry(lambda: checkpoint_manager.clean_up(run, self._writer.generation), run)
            names = self._retry(partial(run_folder.checkpoint_names, run), run)
            found = self._retry(self._writer.read, run)
            self._stored = [name.images_seen for name in names if name.counts(found)]
            self._read_curves(at)
            before = self._read_status()
            if before is not None:
                reached = max(reached, before.images_seen)
                self._images_lost = before.images_lost
                self._minutes_before = before.minutes
            self._images_lost += max(0, reached - at)
            self._write_status()
            yield folder

    def _begin_generation(self, stack: ExitStack) -> Path | None:
        """Begin a generation at the newest valid checkpoint, which is returned; `stack` keeps its folder."""
        run = self._location
        if not self._has_driver:
            self._retry(self._writer.claim, run)
        while True:
            found = self._retry(self._writer.read, run)
            newest = checkpoint_manager.latest_valid(self._run, found, self._timeout_s, self.warn)
            folder = stack.enter_context(newest)
            at = checkpoint.images_seen_at(folder)
            num_rows = self._retry(partial(curves.num_stored, run, found), run)
            begin = partial(self._writer.begin, found, at, num_rows)
            if self._retry(begin, run):
                return folder
            stack.close()  # workers that seemed dead have stored something in the meantime

    def metrics(self, values: Mapping[str, float], images_seen: int) -> None:
        """Record values measured at `images_seen`, except those that are recorded already, and show them.

        The goodput is shown with them, also while it is not recorded.
        """
        now_ms = int(time.time() * 1000)
        for name, value in values.items():
            if (name, images_seen) not in self._recorded:
                self._rows.append(CurveRow(name, images_seen, float(value), now_ms))
        shown = {**values, "train/goodput": self.goodput()}
        self._notify(run_state.METRICS, (shown, images_seen))

    def goodput(self) -> float:
        """The share of the images trained on that no crash has lost."""
        trained = self._images_seen + self._images_lost
        return self._images_seen / trained if trained else 1.0

    def progress(self, progress: Progress) -> None:
        """Report how far training is."""
        self.last_progress = progress
        self._images_seen = progress.images_seen
        self._notify(run_state.PROGRESS, progress)
        if time.monotonic() - self._status_at > STATUS_INTERVAL_S:
            self._write_status()

    def save(self, state: State, best: bool, before: Mapping[str, bytes] | None = None) -> None:
        """Store `state` as a checkpoint, with the points since the last one; if `best`, also as the best one.

        Args:
            before: files of the run that are stored before the checkpoint is valid, by name, unless they exist.
        """
        while not self._room.acquire(timeout=ROOM_POLL_S):
            self.check()  # after a failure nothing is stored, and no room is made
        self.check()
        self._images_seen = state.images_seen
        snapshot = state.snapshot(self._config, self._identity)
        job = partial(
            self._save,
            snapshot=snapshot,
            rows=self._take_rows(),
            before=before or {},
            best=best,
            began=time.monotonic(),
        )
        self._todo.put(job)

    def publish(self, name: str, data: bytes) -> None:
        """Store a file that training can do without."""
        self._todo.put(partial(self._publish, name, data))

    def picture(self, series: str, image: Pixels, images_seen: int) -> None:
        """Record a picture of a series, runs.SAMPLES or runs.DENOISING, unless it is recorded already.

        Args:
            image: uint8 [H, W, C], C 1 or 3.
        """
        data = png_bytes(image, int(time.time() * 1000))
        self._todo.put(partial(self._publish_once, f"{series}/{images_seen:012d}.png", data))

    def check(self) -> None:
        """Raise the error that made storing fail, if there was one."""
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Return when everything is stored; the curves of a finished run are then one file."""
        if self._next_row is not None:  # the recorded points have been read
            self._write_status()
        if self._images_seen >= self._config.train.total_images:
            self._todo.put(self._merge_curves)
        self._todo.join()
        self.check()

    def flush_on_error(self) -> None:
        """Store the points since the last checkpoint; no other checkpoint will follow."""
        self._todo.put(partial(self._publish_rows, self._take_rows()))
        self.flush()

    def close(self) -> None:
        """End the thread once everything is stored; does not wait for it."""
        self._todo.put(None)

    def _read_curves(self, at: int) -> None:
        """Merge the curves' parts, and note which points beyond `at` are recorded."""
        table = self._retry(self._merge, self._location)
        beyond = table.filter(pc.field("images_seen") > at).to_pylist()
        self._recorded = {(row["name"], row["images_seen"]) for row in beyond}
        self._next_row = self._retry(self._writer.read, self._location).num_rows

    def _merge(self) -> pa.Table:
        return curves.merge(self._location, self._writer.generation, self.warn)

    def _take_rows(self) -> list[CurveRow]:
        taken = self._rows
        self._rows = []
        return taken

    def _read_status(self) -> Status | None:
        """status.json of the run; None: there is none, or it is damaged."""
        try:
            return self._retry(lambda: run_folder.read_status(self._location), self._location)
        except StorageError:
            raise
        except UserError as error:
            self.warn(f"{error}; it will be rewritten from {self._images_seen} images on")
            return None

    def _retry(self, call: Callable[[], T], where: Location, most_s: float = math.inf) -> T:
        return checkpoint_manager.retry_in_folder(call, where, min(self._timeout_s, most_s), self.warn)

    def _write_status(self) -> None:
        self._status_at = time.monotonic()
        minutes = self._minutes_before + (self._status_at - self._began_at) / 60
        status = Status(
            status=RunStatus.RUNNING,
            images_seen=self._images_seen,
            images_lost=self._images_lost,
            minutes=minutes,
            hardware=self._hardware,
            generation=self._writer.generation,
        )
        self._todo.put(partial(self._replace_status, status))

    # The methods below run in the thread.

    def _run_jobs(self) -> None:
        while (job := self._todo.get()) is not None:
            try:
                if self._failure is None:
                    job()
            except BaseException as error:  # of any type: `check` raises it in the training thread
                self._failure = self._cause(error)
            self._todo.task_done()

    def _cause(self, error: BaseException) -> BaseException:
        """`error`, or Superseded if these workers were: their successors may have removed what `error` is about."""
        with contextlib.suppress(OSError):
            try:
                self._writer.check()
            except UserError as other:
                return other
        return error

    def _put(self, write: Callable[[], object], file: Location) -> None:
        """Store a file that training can do without."""
        timeout_s = min(self._timeout_s, FILE_TIMEOUT_S)
        try:
            retry_io(write, where=file.uri, timeout_s=timeout_s, warn=self.warn)
        except (StorageError, FileNotFoundError) as error:
            self.warn(str(error))

    def _publish(self, name: str, data: bytes) -> None:
        file = self._location.child(name)

        def write() -> None:
            self._writer.check()
            file.write(data)

        self._put(write, file)

    def _publish_once(self, name: str, data: bytes) -> None:
        file = self._location.child(name)
        self._put(partial(file.create, data), file)

    def _replace_status(self, status: Status) -> None:
        def change(before: Status | None) -> Status:
            if before is not None and before.generation > status.generation:
                self._writer.check()
            return status

        self._put(partial(run_folder.replace_status, self._location, change), self._location)

    def _publish_rows(self, rows: list[CurveRow]) -> None:
        for name, data in self._packed(rows).items():
            self._publish_once(name, data)
            self._retry(self._commit, self._location, FILE_TIMEOUT_S)

    def _packed(self, rows: list[CurveRow]) -> dict[str, bytes]:
        """The file with `rows`; none if there are no rows, or if the recorded ones could not be read."""
        if not rows or self._next_row is None:
            return {}
        name, data = curves.part(self._next_row, rows, self._writer.generation)
        self._next_row += len(rows)
        return {name: data}

    def _commit(self) -> None:
        """Make the stored rows final, and let all but the newest checkpoints be removed."""
        kept = self._stored[-self._config.train.keep_checkpoints :]
        self._writer.commit(self._next_row or 0, min(kept, default=0))

    def _merge_curves(self) -> None:
        try:
            self._retry(self._merge, self._location, FILE_TIMEOUT_S)
        except StorageError as error:
            self.warn(f"the curves are not merged: {error}")

    def _save(
        self, snapshot: Snapshot, rows: list[CurveRow], before: Mapping[str, bytes], best: bool, began: float
    ) -> None:
        seen = snapshot.images_seen
        run = self._location
        try:
            for name, data in {**self._packed(rows), **before}.items():
                file = run.child(name)
                self._retry(partial(file.create, data, durable=True), file)
            self._retry(self._commit, run)
            generation = self._writer.generation
            checkpoint_manager.store(snapshot, run, generation, best, self._retry)
            self._stored.append(seen)
            self._retry(self._commit, run)
        finally:
            self._room.release()
        self.newest = str(CheckpointName(seen, generation))
        self._notify(run_state.COMMITTED, seen)
        self._notify(run_state.METRICS, ({"checkpoint_seconds": time.monotonic() - began}, seen))
        try:
            self._retry(lambda: checkpoint_manager.retire(run, generation), run, FILE_TIMEOUT_S)
        except StorageError as error:
            self.warn(f"an old checkpoint could not be removed: {error}")
