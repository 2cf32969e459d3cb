"""One worker of a Ray Train group: `RayRuntime`, the Ray side of `runtime.Runtime`.

The run reports to Ray by `ray.train.report`: metrics, and each stored checkpoint as a pointer, as Ray documents it for
checkpoints that Ray does not upload itself. A run resumes from storage; the pointers are for Ray's callbacks, metrics
and API. All workers must report in the same step; they agree on it in the all-reduce that every step has anyway.
"""

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor

from ddpm.config.tree import Config
from ddpm.data import ray_stream
from ddpm.data.plan import ReadOrder
from ddpm.data.reading import DataSet, MicroBatch
from ddpm.runs import names
from ddpm.runs.checkpoint import images_seen_at
from ddpm.runs.run_folder import RunFolder
from ddpm.training import run_state
from ddpm.training.runtime import Runtime
from ddpm.training.store import RunStore
from ddpm.utils import devices

STOP_POLL_S = 0.5
"""Interval at which rank 0 polls for a stop request; each poll costs training a millisecond."""
REPORT_INTERVAL_S = 5.0
"""Interval of reports to Ray Train, and of checks whether a node is about to be preempted."""
POINTER = "pointer_ckpt.json"
"""File of a reported checkpoint: the URI of the stored one."""


class RayRuntime(Runtime):
    """One worker of a Ray Train group.

    Args:
        state: the run's RunState actor.
        store: the run's store, on rank 0.
        folder: Ray Train's storage_path, on the driver's node.
    """

    def __init__(
        self,
        config: Config,
        data_set: DataSet,
        run: RunFolder,
        state: Any,
        store: RunStore | None,
        folder: str,
    ) -> None:
        super().__init__(config, data_set, data_set.held_out(), store)
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device != devices.CPU:
            torch.accelerator.set_device_index(self.device)
        self._run = run
        self._state = state
        self._reading = ExitStack()
        if self.device == devices.CPU:
            assert config.cluster.threads_per_worker is not None, "resources.with_workers sets it"
            torch.set_num_threads(config.cluster.threads_per_worker)
        self._pointers = Path(folder, context.get_experiment_name(), run.name)
        self.takes_steps = False
        """Whether the workers take steps."""
        self._reported = ""
        self._reported_at = time.monotonic()
        self._stop = threading.Event()
        self._closed = threading.Event()
        self._listening_failed: Exception | None = None
        if store is not None:
            state.set.remote(run_state.WORKERS, self.world_size)
            threading.Thread(target=self._listen, name="ddpm-stop", daemon=True).start()

    def batches(self, images_seen: int) -> Iterator[MicroBatch]:
        batches = ray_stream.micro_batches(
            self._train,
            ReadOrder.from_config(self._config),
            images_seen,
            rank=self.rank,
            world_size=self.world_size,
            broadcast=ray.train.collective.broadcast_from_rank_zero,
        )
        self._reading.callback(batches.close)
        return batches

    def any_of(self, *flags: Tensor | bool, at_once: bool) -> tuple[Tensor, list[int]]:
        """`Runtime.any_of`; also reports to Ray when due, since all workers must do that in the same step."""
        due = self.store is not None and time.monotonic() - self._reported_at > REPORT_INTERVAL_S
        agreed, counts = super().any_of(*flags, due, at_once=at_once)
        if counts[-1]:
            self.report()
        return agreed[:-1], counts[:-1]

    def report(self) -> None:
        """Report progress to Ray Train, and a checkpoint that is new; every rank calls it."""
        metrics = dict[str, Any]()
        pointer = None
        if self.store is not None:
            self._reported_at = time.monotonic()
            newest = self.store.newest
            metrics = dataclasses.asdict(self.store.last_progress) if self.store.last_progress else {}
            pointer = self._pointer(newest) if newest != self._reported else None
            self._reported = newest
        ray.train.report(metrics, checkpoint=pointer, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
        if ray.train.get_preemption_info() and self.store is not None and not self._stop.is_set():
            ray.get(self._state.set.remote(run_state.STOP, run_state.PREEMPTION))
            self._stop.set()

    def _pointer(self, newest: str) -> Checkpoint:
        """The pointer to a stored checkpoint, for Ray Train."""
        pointer = self._pointers / newest
        if self._pointers.parent.exists():  # only on the driver's node
            pointer.mkdir(parents=True, exist_ok=True)
            (pointer / POINTER).write_text(json.dumps({"uri": self._run.location.child(newest).uri}))
        return Checkpoint(str(pointer))

    def is_wanted(self) -> bool:
        """Whether the run has not been asked to stop; every rank calls it, before it uses the run's folder."""
        stop = None
        if self.store is not None:
            stop = ray.get(self._state.snapshot.remote()).get(run_state.STOP)
        return ray.train.collective.broadcast_from_rank_zero(stop) in (None, *run_state.ENDS_GROUP)

    def may_begin(self) -> bool:
        allowed = self.store is None or ray.get(self._state.begin.remote())
        self.takes_steps = bool(ray.train.collective.broadcast_from_rank_zero(allowed))
        return self.takes_steps

    def wants_stop(self) -> bool:
        if self.store is not None:
            self.store.check()  # a checkpoint that cannot be stored ends the run now, not when the next is due
        if self._listening_failed is not None:
            raise self._listening_failed
        return self._stop.is_set()

    def _listen(self) -> None:
        try:
            while not self._stop.is_set() and not self._closed.is_set():
                if ray.get(self._state.snapshot.remote()).get(run_state.STOP):
                    self._stop.set()
                self._closed.wait(STOP_POLL_S)
        except Exception as error:  # the actor died; `wants_stop` raises it in the loop
            self._listening_failed = error

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """The newest checkpoint, which rank 0 finds and broadcasts, so that all ranks restore the same one."""
        with ExitStack() as stack:
            folder = None
            if self.store is not None:
                progress = ray.get(self._state.snapshot.remote()).get(run_state.PROGRESS)
                reached = progress.images_seen if progress else 0
                folder = stack.enter_context(self.store.latest_checkpoint(reached))
                if progress:  # what is lost is counted once, also if this group dies before its first step
                    progress = dataclasses.replace(progress, images_seen=images_seen_at(folder))
                    self._state.set.remote(run_state.PROGRESS, progress)
            name = ray.train.collective.broadcast_from_rank_zero(folder.name if folder else None)
            if self.store is None and name:
                location = self._run.location.child(name)
                timeout_s = self._config.run.storage_timeout_s
                folder = stack.enter_context(names.as_folder(location, timeout_s))
            yield folder

    def close(self) -> None:
        """Stop reading and listening; the worker may stay for another run."""
        self._reading.close()
        self._closed.set()
