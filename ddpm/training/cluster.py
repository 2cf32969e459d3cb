"""Training on Ray: `fit` runs the loop on the workers of a Ray Train group.

The driver checks everything that can be checked before anything is started, then watches. Workers tell it
how far they are through a small actor, the board; only checkpoints go through `ray.train.report`.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from torch import Tensor, nn

from ddpm import config as configs
from ddpm import runs
from ddpm.config import Config, UserError
from ddpm.data import stream
from ddpm.data.reading import DataSet, Images
from ddpm.progress import Display
from ddpm.runs import Run
from ddpm.tracking import Address, Delivery, MlflowTracker, tracking_uri, without_password
from ddpm.training import checkpoint, loop, placement
from ddpm.training.runtime import MicroBatch, NoTracker, Progress, read_held_out

POLL_INTERVAL_S = 1.0


class TrainingFailed(UserError):
    """Workers failed more often than cluster.max_failures allows."""

    exit_code = 1


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    run: Run
    images_seen: int
    checkpoint: str
    """URI of the newest checkpoint."""
    was_finished: bool
    """Nothing was left to do."""
    delivery: Delivery | None
    """How tracking ended; None when nothing was left to do."""


def connect(verbose: bool = False) -> None:
    """Join the Ray cluster of the environment (RAY_ADDRESS, or one started here), or start one on this machine."""
    # The controller takes one report per poll: by default every 2 s, which a checkpoint would wait for.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Of a cluster started here: training comes first on this machine, not after Ray's own processes.
    os.environ.setdefault("RAY_worker_niceness", "0")
    level = logging.INFO if verbose else logging.ERROR
    ray.init(log_to_driver=verbose, logging_level=level, include_dashboard=False)
    for name in ("ray.train", "ray.data", "ray"):
        logging.getLogger(name).setLevel(level)


def fit(config: Config, data_set: DataSet, *, verbose: bool = False) -> Result:
    """Train the run that `config` names to the end on the connected Ray cluster, from its newest checkpoint on.

    Args:
        config: checked by `loop.check`; with run.name, and absolute run.storage and data.shards.
        data_set: the split to train on.
        verbose: let Ray's own messages through.

    Raises:
        UserError: the config does not fit the cluster, or what the run has begun with.
        TrainingFailed: workers failed too often.
    """
    resources = placement.resources_per_worker(config)
    placement.check_storage(config)
    assert config.run.name is not None, "runs.settled names a run"
    run = runs.open_run(config.run.name, config.run.storage)
    if finished := _finished(config, data_set, run):
        return finished
    address = Address(tracking_uri(), config.run.experiment, run.name, run.key)
    board: Any = ray.remote(num_cpus=0)(_Board).remote()
    spec = {
        "config": config,
        "data_set": data_set,
        "run": run,
        "address": address,
        "board": board,
        "verbose": verbose,
    }
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config=spec,
        scaling_config=ScalingConfig(
            num_workers=config.cluster.num_workers,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=str(Path(run.location.path).parent),
            storage_filesystem=run.location.filesystem,
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
        ),
    )
    try:
        with _watch(board, config.train.total_images):
            trainer.fit()
        failure = None
    except ray.train.TrainingFailedError as error:
        failure = error
    notes: dict[str, Any] = ray.get(board.read.remote())
    if "failure" in notes:
        raise notes["failure"]
    if failure is not None:
        if verbose:
            raise failure
        raise TrainingFailed(f"training failed: {_root_cause(failure)} (--verbose shows the whole story)")
    newest = runs.checkpoints(run.location)[-1]
    return Result(run, config.train.total_images, newest.uri, False, notes.get("delivery"))


def _work(spec: dict[str, Any]) -> None:
    """What each worker runs."""
    board, config = spec["board"], spec["config"]
    if "failure" in ray.get(board.read.remote()):
        return  # a mistake that no restart mends: let the group end, and the driver tell
    if not spec["verbose"]:
        logging.getLogger("ray").setLevel(logging.ERROR)
        stream.hide_progress()
    runtime = RayRuntime(config, spec["data_set"], spec["run"], board)
    tracker = MlflowTracker(spec["address"], configs.flatten(config)) if runtime.rank == 0 else NoTracker()
    status = "FAILED"
    try:
        loop.train(config, runtime, tracker)
        status = "FINISHED"
    except UserError as error:
        ray.get(board.note.remote("failure", error))
        raise
    finally:
        if isinstance(tracker, MlflowTracker):
            ray.get(board.note.remote("delivery", tracker.close(status)))


class RayRuntime:
    """One worker of a Ray Train group; a `runtime.Runtime`."""

    def __init__(self, config: Config, data_set: DataSet, run: Run, board: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.identity = {"run_key": run.key, "data_fingerprint": data_set.rows.fingerprint}
        self._config, self._data_set, self._run, self._board = config, data_set, run, board
        if self.device.type == "cpu":
            cores = len(os.sched_getaffinity(0)) // context.get_local_world_size()
            torch.set_num_threads(config.cluster.threads_per_worker or max(1, cores))

    def wrap(self, net: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return net
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)

    def batches(self, images_seen: int) -> Iterator[MicroBatch]:
        for todo in stream.legs(self._config, images_seen):
            iterators = None
            if self.rank == 0:
                iterators = stream.split(self._config, self._data_set, todo, self.world_size)
            iterators = ray.train.collective.broadcast_from_rank_zero(iterators)
            yield from stream.micro_batches(iterators[self.rank], self._config, self.rank, self.world_size)

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

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        newest = ray.train.get_checkpoint()
        if newest is None:
            yield None
            return
        with newest.as_directory() as folder:
            yield Path(folder)

    def report(self, folder: Path | None, images_seen: int, best: bool) -> None:
        if folder is not None and best:
            self._keep_best(folder, images_seen)
        ray.train.report(
            {"images_seen": images_seen},
            checkpoint=ray.train.Checkpoint.from_directory(folder) if folder is not None else None,
            checkpoint_dir_name=checkpoint.name_at(images_seen),
        )

    def progress(self, progress: Progress) -> None:
        self._board.note.remote("progress", progress)

    def publish(self, name: str, data: bytes) -> None:
        self._run.location.child(name).write(data)

    def _keep_best(self, folder: Path, images_seen: int) -> None:
        """A copy of its own: Ray keeps the newest checkpoints, or the best, but not both."""
        location = self._run.location
        older = [name for name in location.folders() if name.startswith(checkpoint.BEST_PREFIX)]
        target = location.child(checkpoint.name_at(images_seen, checkpoint.BEST_PREFIX))
        target.filesystem.create_dir(target.path)
        pafs.copy_files(str(folder), target.path, destination_filesystem=target.filesystem)
        for name in older:
            if location.child(name).uri != target.uri:
                location.child(name).delete()


class _Board:
    """What the workers want the driver to know; the last word on each subject. An actor that needs no CPU."""

    def __init__(self) -> None:
        self._notes: dict[str, Any] = {}

    def note(self, subject: str, value: Any) -> None:
        self._notes[subject] = value

    def read(self) -> dict[str, Any]:
        return self._notes


@contextmanager
def _watch(board: Any, total_images: int) -> Iterator[None]:
    """Show the board's progress for as long as the context lasts."""
    stop = threading.Event()

    def show(display: Display) -> None:
        progress = ray.get(board.read.remote()).get("progress")
        if progress is not None:
            detail = f"{progress.images_per_s:,.0f} images/s  loss {progress.loss:.4f}"
            display.update(min(progress.images_seen, total_images), detail)

    def follow(display: Display) -> None:
        while not stop.wait(POLL_INTERVAL_S):
            show(display)

    with Display("images", total_images) as display:
        thread = threading.Thread(target=follow, args=(display,), name="ddpm-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5)
            show(display)


def _finished(config: Config, data_set: DataSet, run: Run) -> Result | None:
    """The result, if the newest checkpoint is the end of the run.

    Raises:
        UserError: the run was begun with another configuration, or on other data.
    """
    found = runs.checkpoints(run.location)
    if not found:
        return None
    with runs.local_checkpoint(found[-1].uri) as folder:
        checkpoint.check_same_run(checkpoint.read_config(folder), config, found[-1].uri)
        position = checkpoint.read_state(folder)
    if position["data_fingerprint"] != data_set.rows.fingerprint:
        raise UserError(
            f"{found[-1].uri} was trained on other data (fingerprint {position['data_fingerprint'][:12]}, now "
            f"{data_set.rows.fingerprint[:12]}); use that data set, or another --run.name"
        )
    if position["images_seen"] < config.train.total_images:
        return None
    return Result(run, position["images_seen"], found[-1].uri, True, None)


def _root_cause(error: ray.train.TrainingFailedError) -> str:
    """The line of the failure that says what went wrong."""
    failures = getattr(error, "worker_failures", None) or {}
    cause: BaseException = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else repr(cause)


def summary(result: Result) -> list[str]:
    """Where everything is, in lines for a person."""
    lines = [f"checkpoint  {result.checkpoint}", f"samples     {result.run.location.uri}/samples/latest.png"]
    if result.delivery is None:
        return lines
    if result.delivery.undelivered:
        lines.append(
            f"MLflow      {result.delivery.undelivered} items could not be delivered; is it reachable?"
        )
    elif result.delivery.run_id:
        lines.append(f"MLflow      run {result.delivery.run_id} in {without_password(tracking_uri())}")
    return lines
