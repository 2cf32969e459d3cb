"""One worker of a Ray Train group: `RayRuntime`, the Ray side of `runtime.Runtime`.

The run reports to Ray by `ray.train.report`: metrics, and each stored checkpoint as a pointer, as Ray documents it for
checkpoints that Ray does not upload itself. A run resumes from storage; the pointers are for Ray's callbacks, metrics
and API. All workers must report in the same step; they agree on it in the all-reduce that every step has anyway.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor, nn

from ddpm.checkpoints import checkpoint
from ddpm.checkpoints.runs import Run
from ddpm.config import Config
from ddpm.data import ray_dataset
from ddpm.data.plan import ReadOrder
from ddpm.data.reading import DataSet, Images, MicroBatch
from ddpm.hub import resolve
from ddpm.tracking.metrics_buffer import MetricsBuffer
from ddpm.training import run_state
from ddpm.training.device import LateFlags, stack_flags
from ddpm.training.rank_zero import RankZero
from ddpm.training.runtime import read_held_out
from ddpm.utils.progress import Progress

POINTER = "pointer_ckpt.json"
"""File of a reported checkpoint: the URI of the stored one."""


class SharedBuffer(MetricsBuffer):
    """A MetricsBuffer that also sends the values to a RunState actor."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self._state = state

    def metrics(self, values: Mapping[str, float], images_seen: int) -> None:
        super().metrics(values, images_seen)
        self._state.measured.remote(dict(values), images_seen)


class RayRuntime:
    """One worker of a Ray Train group; a `runtime.Runtime`.

    Args:
        state: the run's RunState actor.
        folder: Ray Train's storage_path, on the driver's node.
    """

    def __init__(
        self, config: Config, data_set: DataSet, run: Run, state: Any, buffer: MetricsBuffer, folder: str
    ) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.identity = {"run_key": run.key, "data_fingerprint": data_set.rows.fingerprint}
        self._config, self._data_set, self._run = config, data_set, run
        self._reading = ExitStack()
        if self.device.type == "cpu":
            cores = len(os.sched_getaffinity(0)) // context.get_local_world_size()
            torch.set_num_threads(config.cluster.threads_per_worker or max(1, cores))
        self._rank_zero = RankZero(config, data_set, run, state, buffer) if self.rank == 0 else None
        if self._rank_zero:
            state.set.remote(run_state.WORKERS, self.world_size)
        self._flags = LateFlags()
        self._pointers = Path(folder, context.get_experiment_name(), run.name)

    def wrap(self, net: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return net
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)

    def batches(self, images_seen: int) -> Iterator[MicroBatch]:
        batches = ray_dataset.micro_batches(
            self._data_set,
            ReadOrder.from_config(self._config),
            images_seen,
            rank=self.rank,
            world_size=self.world_size,
            broadcast=ray.train.collective.broadcast_from_rank_zero,
            on_substitutions=self._rank_zero.substituted if self._rank_zero else None,
        )
        self._reading.callback(batches.close)
        return batches

    def held_out(self) -> Images | None:
        return read_held_out(self._data_set.held_out(), self._config)

    def mean(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
            values = values / self.world_size
        return values

    def gather(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def any_of(self, *flags: Tensor | bool, at_once: bool) -> tuple[Tensor, list[int]]:
        """`Runtime.any_of`; also reports to Ray when due, since all workers must do that in the same step."""
        due = self._rank_zero is not None and self._rank_zero.report_is_due()
        agreed = stack_flags((*flags, due), self.device)
        if self.world_size > 1:
            counts = agreed.float()
            torch.distributed.all_reduce(counts)
            agreed = counts > 0
        *answers, reports = self._flags.read(agreed, at_once)
        if reports:
            self._report()
        return agreed[:-1], answers

    def _report(self) -> None:
        """Report progress to Ray Train; every rank calls it."""
        metrics, newest = self._rank_zero.report() if self._rank_zero else ({}, None)
        pointer = self._pointer(newest) if newest else None
        ray.train.report(metrics, checkpoint=pointer, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
        if ray.train.get_preemption_info() and self._rank_zero:
            self._rank_zero.preempted()

    def _pointer(self, newest: str) -> Checkpoint:
        """The pointer to a stored checkpoint, for Ray Train."""
        pointer = self._pointers / newest
        if self._pointers.parent.exists():  # only on the driver's node
            pointer.mkdir(parents=True, exist_ok=True)
            (pointer / POINTER).write_text(json.dumps({"uri": self._run.location.child(newest).uri}))
        return Checkpoint(str(pointer))

    def wants_stop(self) -> bool:
        return self._rank_zero is not None and self._rank_zero.wants_stop()

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """The newest checkpoint, which rank 0 finds and broadcasts, so that all ranks restore the same one."""
        with ExitStack() as stack:
            folder = stack.enter_context(self._rank_zero.restored()) if self._rank_zero else None
            name = ray.train.collective.broadcast_from_rank_zero(folder.name if folder else None)
            if not self._rank_zero and name:
                place, timeout_s = self._run.location.child(name), self._config.run.storage_timeout_s
                folder = stack.enter_context(resolve.as_folder(place, timeout_s))
            yield folder

    def save(self, snapshot: checkpoint.Snapshot, best: bool) -> None:
        assert self._rank_zero, "rank 0 saves"
        self._rank_zero.save(snapshot, best)

    def flush(self) -> None:
        if self._rank_zero:
            self._rank_zero.checkpoints.flush()
        self._report()

    def facts(self) -> dict[str, float]:
        is_elastic = len(self._config.cluster.world_sizes()) > 1
        workers = {"train/workers": float(self.world_size)} if is_elastic else {}
        return workers | self._rank_zero.facts() if self._rank_zero else {}

    def progress(self, progress: Progress) -> None:
        assert self._rank_zero, "rank 0 tells"
        self._rank_zero.progress(progress)

    def publish(self, name: str, data: bytes) -> None:
        assert self._rank_zero, "rank 0 publishes"
        self._rank_zero.checkpoints.publish(name, data)

    def flush_on_error(self) -> None:
        if self._rank_zero:
            self._rank_zero.flush_on_error()

    def close(self) -> None:
        """Stop reading and rank 0's threads; the worker may stay for another run."""
        self._reading.close()
        if self._rank_zero:
            self._rank_zero.close()
