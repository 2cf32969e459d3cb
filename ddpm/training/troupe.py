"""The workers of a training run on Ray Train, which may stay for the next run: a search begins a trial in a second.

Its own room because it says how workers come, what they do and how they go; what becomes of a run when they die is
for `cluster.fit`.
"""

import atexit
import contextlib
import fcntl
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.util
import torch
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ddpm.config import Config, UserError
from ddpm.data import librarian
from ddpm.data.reading import DataSet
from ddpm.records import Outbox
from ddpm.runs import Run
from ddpm.training import board as boards
from ddpm.training import loop, placement
from ddpm.training.controller import FailureBudget, ProcessGroup, ResizeWithoutLoss
from ddpm.training.watch import Aside
from ddpm.training.worker import RayRuntime

FOLDER_PREFIX, OWNER = "ddpm-ray-train-", "owner"
"""Temporary folders of Ray Train runs; the process that uses one holds a lock on the file `owner` in it."""
PLAY_POLL_S = 0.1
"""Workers that stay look so often for the next run."""
LEAVE_POLL_S = 1.0


class Troupe:
    """The workers, and what stays with them from one run to the next: processes, imports, the process group.

    They start with the first run, and anew after a failure. One run at a time is on; all ask the same of the cluster.

    Args:
        config: of any of the runs.
        verbose: let Ray's own messages through.
        stays: after the end of a run; until `close`.
    """

    def __init__(self, config: Config, verbose: bool = False, stays: bool = True) -> None:
        librarian.announce()
        self.stays, self.board = stays, boards.RunStateClient()
        reading = librarian.employ(config.cluster.world_sizes()[-1], verbose)
        self._config, self._resources = config, placement.resources_per_worker(config)
        self._spec = {"board": self.board.actor, "librarian": reading, "verbose": verbose, "stays": stays}
        self._number = 0
        self._workers: Aside | None = None

    def begin(self, config: Config, data_set: DataSet, run: Run) -> None:
        """Put a run on."""
        self._number += 1
        what = ray.put({"config": config, "data_set": data_set, "run": run})
        self.board.begin(boards.Play(self._number, what))

    def workers(self) -> Aside:
        """The Ray Train run, which is started if there is none; it ends when the workers leave."""
        if self._workers is None or not self._workers.is_alive():
            if self._workers is not None:
                self._free_place()
            self._workers = Aside(self._fit)
        return self._workers

    def close(self, timeout_s: float) -> None:
        """Let the workers leave, and wait until they have."""
        deadline = time.monotonic() + timeout_s
        while True:
            ray.get(self.board.actor.leave.remote())  # again, since the board may die meanwhile
            if self._workers is None or not self._workers.is_alive() or time.monotonic() > deadline:
                return
            self._workers.join(LEAVE_POLL_S)

    def _fit(self) -> None:
        with _own_folder() as folder:
            _trainer(self._config, self._spec, self._resources, folder).fit()

    def _free_place(self) -> None:
        """Give back what a dead controller's workers held: data tasks would wait for ever for the CPUs."""
        place = self.board.read().get(boards.PLACE)
        if place is not None:
            ray.util.remove_placement_group(place)
            self.board.note(boards.PLACE, None)


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    """A temporary folder, also removed when this process exits; those of processes that were killed are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError), left.open() as owner:  # an error: it is in use
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as folder, Path(folder, OWNER).open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # the thread that is in here may not end
        yield folder


class _Trainer(DataParallelTrainer):
    """A trainer without processes that every start would wait for (Ray 2.60 has no switch for them).

    - The manager of data sets: rank 0 splits the data itself, at the cursor of the checkpoint.
    - The cleaner of placement groups: `Troupe._free_place` does it, and the end of the job. It would ask the dashboard
      whether the controller lives, and where there is none clean nothing.
    """

    def _create_default_callbacks(self) -> list[Any]:
        spared = DatasetsCallback | PlacementGroupCleanerCallback
        return [c for c in super()._create_default_callbacks() if not isinstance(c, spared)]


def _trainer(
    config: Config, spec: dict[str, Any], resources: dict[str, float], folder: str
) -> DataParallelTrainer:
    sizes = config.cluster.world_sizes()
    callbacks: list[Any] = [FailureBudget(config, spec["board"]), ResizeWithoutLoss(spec["board"])]
    return _Trainer(
        # Not as train_loop_config, which the controller would unpack, with all its modules.
        partial(work, spec),
        backend_config=ProcessGroup("nccl" if "GPU" in resources else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=sizes[0] if len(sizes) == 1 else (sizes[0], sizes[-1]),
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=config.cluster.resize_interval_s,
        ),
        run_config=RunConfig(  # type: ignore[arg-type] # which of two, is_v2_enabled says
            name=config.run.name,
            storage_path=folder,  # nothing is reported, so nothing but a marker gets there
            # Ray's own count knows nothing of progress: FailureBudget ends a run that makes none.
            failure_config=FailureConfig(max_failures=-1),
            callbacks=callbacks,
        ),
    )


def work(spec: dict[str, Any]) -> None:
    """What each worker runs: a run, and where workers stay the next ones, as they come."""
    board, number = spec["board"], 0
    ended, told = None, ""
    if not spec["verbose"]:
        logging.getLogger("ray").setLevel(logging.ERROR)
    board.note.remote(boards.PLACE, ray.util.get_current_placement_group())
    while True:
        play, life = ray.get(board.play.remote(number))
        if play == "leave":
            return
        if play == "wait":
            if ended is not None and life != told:  # a board that was started anew does not know
                told = ray.get(board.ended.remote(number, ended))
            time.sleep(PLAY_POLL_S)
            continue
        number = play.number
        ended = _perform(**ray.get(play.what), spec=spec)
        if ended is not None:
            told = ray.get(board.ended.remote(number, ended))
        leaves = ray.get(board.read.remote()).get(boards.STOP) == boards.PREEMPTION
        if leaves or not spec["stays"]:
            return


def _perform(config: Config, data_set: DataSet, run: Run, spec: dict[str, Any]) -> int | None:
    """One worker's part in a run; rank 0 returns images_seen at its end."""
    board, outbox = spec["board"], Outbox()
    runtime = RayRuntime(config, data_set, run, board, spec["librarian"], outbox)
    images_seen = -1
    try:
        images_seen = loop.train(config, runtime, outbox).images_seen
    except UserError as error:
        ray.get(board.note.remote(boards.FAILURE, error))
        runtime.last_words()
        if not (
            spec["stays"] and isinstance(error, loop.NonFinite)
        ):  # of that, all workers know in the same step
            raise
    finally:
        runtime.close()
        if config.train.compile:  # what was compiled for one net counts as a variant of the next one's
            torch.compiler.reset()
    return images_seen if runtime.rank == 0 else None
