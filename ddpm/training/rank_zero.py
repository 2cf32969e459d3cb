"""Rank 0's tasks besides training: checkpoints, progress, unreadable images, requests to stop."""

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from ddpm.checkpoints import checkpoint
from ddpm.checkpoints.runs import Run
from ddpm.config import Config
from ddpm.data.corrupt import CorruptImages, Substitution
from ddpm.data.reading import DataSet
from ddpm.tracking import spool
from ddpm.tracking.metrics_buffer import MetricsBuffer, segment_name
from ddpm.training import checkpoint_manager, run_state
from ddpm.training.checkpoint_manager import CheckpointManager
from ddpm.training.runtime import CORRUPT
from ddpm.training.system_metrics import SystemMetrics
from ddpm.utils.progress import Progress
from ddpm.utils.retry import retry_io

STOP_POLL_S = 0.5
"""Interval at which rank 0 polls for a stop request; each poll costs training a millisecond."""
PROGRESS = "progress.json"
"""File of a run with its last position, from which a restart counts the lost images."""
PROGRESS_INTERVAL_S = 10.0
REPORT_INTERVAL_S = 5.0
"""Interval of reports to Ray Train, and of checks whether a node is about to be preempted."""


class RankZero:
    """Checkpoints, counts and stop requests of one run, on the worker of rank 0.

    Args:
        state: the run's RunState actor.
        buffer: the metrics and pictures that wait for the next checkpoint.
    """

    def __init__(
        self, config: Config, data_set: DataSet, run: Run, state: Any, buffer: MetricsBuffer
    ) -> None:
        self._run, self._state, self._buffer, self._warn = run, state, buffer, state.warn.remote
        self._timeout_s = config.run.storage_timeout_s
        self.checkpoints = CheckpointManager(
            run.location, config.train.keep_checkpoints, self._timeout_s, self._committed, self._warn
        )
        self._limits = data_set.rows.num_rows, config.data.max_corrupt_share
        self._corrupt = CorruptImages(*self._limits)
        self._system = SystemMetrics()
        self._images_seen = self._images_lost = 0
        self._progress: Progress | None = None
        self._newest = self._reported = ""
        self._reported_at = time.monotonic()
        self._written_at = float("-inf")
        self._saved_at: dict[int, float] = {}
        self._stop, self._closed = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, name="ddpm-stop", daemon=True).start()

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        """The newest valid checkpoint; also cleans up storage, and counts the images lost since then."""
        with checkpoint_manager.latest_valid(self._run.location, self._timeout_s, self._warn) as folder:
            at = checkpoint.position(folder)
            self._retry_io(lambda: checkpoint_manager.clean_up(self._run.location))
            self._retry_io(lambda: spool.discard_after(self._run.location.child(spool.FOLDER), at))
            reached, lost = self._read_progress()
            self._images_seen, self._images_lost = at, lost + max(0, reached - at)
            self._write_progress()
            self._read_corrupt()
            yield folder

    def report_is_due(self) -> bool:
        return time.monotonic() - self._reported_at > REPORT_INTERVAL_S

    def report(self) -> tuple[dict[str, Any], str | None]:
        """Metrics for Ray Train, and the name of the newest checkpoint, unless it was reported before."""
        self._reported_at, newest = time.monotonic(), self._newest
        is_known, self._reported = newest == self._reported, newest
        metrics = dataclasses.asdict(self._progress) if self._progress else {}
        return metrics, None if is_known else newest

    def preempted(self) -> None:
        """Ask the workers to leave with a checkpoint, before a node is taken away."""
        if not self._stop.is_set():
            ray.get(self._state.set.remote(run_state.STOP, run_state.PREEMPTION))
            self._stop.set()

    def wants_stop(self) -> bool:
        self.checkpoints.check()  # a checkpoint that cannot be stored ends the run now, not when the next is due
        return self._stop.is_set()

    def save(self, snapshot: checkpoint.Snapshot, best: bool) -> None:
        self._images_seen = snapshot.images_seen
        self._saved_at[snapshot.images_seen] = time.monotonic()
        place = self._run.location.child(checkpoint.name_at(snapshot.images_seen))
        self._buffer.tags({"checkpoint": place.uri})
        self.checkpoints.save(snapshot, self._buffer.take(), best)

    def flush_on_error(self) -> None:
        """Store the records since the last checkpoint; no other checkpoint will follow."""
        if segment := self._buffer.take():
            name = segment_name(self._images_seen, after_error=True)
            self.checkpoints.publish(f"{spool.FOLDER}/{name}", segment)
        self.checkpoints.flush()

    def close(self) -> None:
        self._closed.set()
        self.checkpoints.close()

    def facts(self) -> dict[str, float]:
        run = self._images_seen + self._images_lost
        goodput = self._images_seen / run if run else 1.0
        values = {"train/goodput": goodput, "data/corrupt_images": float(self._corrupt.count)}
        self._state.measured.remote(values, self._images_seen)  # even if they are not logged
        return values | self._system.sample()

    def progress(self, progress: Progress) -> None:
        self._progress, self._images_seen = progress, progress.images_seen
        self._state.set.remote(run_state.PROGRESS, progress)
        if time.monotonic() - self._written_at > PROGRESS_INTERVAL_S:
            self._write_progress()

    def substituted(self, substitutions: list[Substitution]) -> None:
        """List images that could not be read.

        Raises:
            CorruptData: there are too many of them.
        """
        if self._corrupt.add(substitutions):
            self.checkpoints.publish(CORRUPT, self._corrupt.to_jsonl().encode())
            self._corrupt.check()

    def _committed(self, images_seen: int) -> None:
        self._newest = checkpoint.name_at(images_seen)
        self._state.set.remote(run_state.COMMITTED, images_seen)
        took = time.monotonic() - self._saved_at.pop(images_seen, time.monotonic())
        self._state.measured.remote({"checkpoint_seconds": took}, images_seen)

    def _listen(self) -> None:
        while not self._stop.is_set() and not self._closed.is_set():
            if ray.get(self._state.snapshot.remote()).get(run_state.STOP):
                self._stop.set()
            self._closed.wait(STOP_POLL_S)

    def _retry_io(self, call: Any) -> Any:
        return retry_io(call, where=self._run.location.uri, timeout_s=self._timeout_s)

    def _read_progress(self) -> tuple[int, int]:
        """The furthest known position of the run, and the images lost before: (images_seen, images_lost)."""
        record = self._run.location.child(PROGRESS)
        try:
            written = json.loads(self._retry_io(record.read))
            reached, lost = int(written["images_seen"]), int(written["images_lost"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            reached = lost = 0
        progress = ray.get(self._state.snapshot.remote()).get(run_state.PROGRESS)
        return max(reached, progress.images_seen if progress else 0), lost

    def _write_progress(self) -> None:
        self._written_at = time.monotonic()
        record = {"images_seen": self._images_seen, "images_lost": self._images_lost}
        self.checkpoints.publish(PROGRESS, (json.dumps(record) + "\n").encode())

    def _read_corrupt(self) -> None:
        file = self._run.location.child(CORRUPT)
        try:
            text = self._retry_io(file.read).decode(errors="replace")
        except FileNotFoundError:
            return
        self._corrupt = CorruptImages.from_jsonl(text, *self._limits, file.uri)
