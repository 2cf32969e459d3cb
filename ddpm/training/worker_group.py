"""The workers of a training run: a `TorchTrainer`, whose workers may stay for the next run.

A search begins a trial in a second that way: processes, imports and process group exist already. `fit.fit` decides
what happens to a run when workers die.
"""

import atexit
import contextlib
import fcntl
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.util
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ddpm.checkpoints.runs import Run
from ddpm.cluster import ray_init, resources
from ddpm.config import Config, to_json
from ddpm.data.reading import DataSet
from ddpm.tracking.metrics_buffer import DataSetInput
from ddpm.training import loop, run_state
from ddpm.training.failures import FailureBudget
from ddpm.training.monitor import CallThread
from ddpm.training.system_metrics import hardware
from ddpm.training.worker import RayRuntime, SharedBuffer
from ddpm.utils.errors import UserError

FOLDER_PREFIX, OWNER = "ddpm-ray-train-", "owner"
"""Temporary folders of Ray Train runs; the process that uses one holds a lock on the file `owner` in it."""
RUN_POLL_S = 0.1
"""Interval at which persistent workers ask for the next run."""
LEAVE_POLL_S = 1.0
NEVER_S = 1e9


class PersistentWorkerGroup:
    """Workers that keep processes, imports and the process group from one run to the next.

    They start with the first run, and again after a failure. Runs follow one another, and need the same resources.

    Args:
        config: that of any of the runs.
        verbose: show Ray's own messages.
        persistent: the workers stay after the end of a run, until `close`.

    Attributes:
        state: the driver's side of the RunState actor.
        per_worker: CPUs and GPUs of each worker, {"CPU": 1.0, "GPU": 1.0}.
    """

    def __init__(self, config: Config, verbose: bool = False, persistent: bool = True) -> None:
        self.persistent, self.state = persistent, run_state.RunStateClient()
        self._config, self.per_worker = config, resources.resources_per_worker(config)
        self._spec = {"state": self.state.actor, "verbose": verbose, "persistent": persistent}
        self._number = 0
        self._workers: CallThread | None = None

    def submit(self, config: Config, data_set: DataSet, run: Run, tags: Mapping[str, str]) -> None:
        """Hand a run to the workers; `tags` are for MLflow."""
        self._number += 1
        what = ray.put({"config": config, "data_set": data_set, "run": run, "tags": tags})
        self.state.submit(run_state.RunSpec(self._number, what))

    def workers(self) -> CallThread:
        """The thread that runs `TorchTrainer.fit`, started if there is none; it ends when the workers leave."""
        if self._workers is None or not self._workers.is_alive():
            if self._workers is not None:
                self._free_place()
            self._workers = CallThread(self._fit)
        return self._workers

    def close(self, timeout_s: float) -> None:
        """Ask the workers to leave, and wait for that, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            ray.get(self.state.actor.close.remote())  # again, since the actor may die meanwhile
            if self._workers is None or not self._workers.is_alive() or time.monotonic() > deadline:
                return
            self._workers.join(LEAVE_POLL_S)

    def _fit(self) -> ray.train.Result:
        with _own_folder() as folder:
            return _trainer(self._config, {**self._spec, "folder": folder}, self.per_worker).fit()

    def _free_place(self) -> None:
        """Remove the placement group of a dead controller's workers: data tasks would wait forever for its CPUs.

        Ray's own cleanup asks the dashboard whether the controller lives, and does nothing without one (2.60).
        """
        place = self.state.snapshot().get(run_state.PLACE)
        if place is not None:
            ray.util.remove_placement_group(place)
            self.state.set(run_state.PLACE, None)


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    """A temporary folder, also removed when this process exits; folders of killed processes are removed first."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError), left.open() as owner:  # an error: the folder is in use
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as folder, Path(folder, OWNER).open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # the thread that uses it may not end
        yield folder


def _trainer(config: Config, spec: dict[str, Any], per_worker: dict[str, float]) -> TorchTrainer:
    sizes, use_gpu = config.cluster.world_sizes(), "GPU" in per_worker
    return TorchTrainer(
        work,
        train_loop_config=spec,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # type checkers see that of Ray Train's version 1
            num_workers=sizes[0] if len(sizes) == 1 else (sizes[0], sizes[-1]),  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=per_worker,
            # Ray would stop a healthy group at once, and the next group would resume from an older checkpoint. The
            # driver asks the group to leave with a new checkpoint instead (monitor.py).
            elastic_resize_monitor_interval_s=NEVER_S,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=config.run.name,
            # Ray's own files stay on this node: a run resumes from its own folder, and a failed write of Ray's to
            # remote storage would end the run. Checkpoints are reported as pointers (worker.py).
            storage_path=spec["folder"],
            failure_config=FailureConfig(max_failures=-1),  # FailureBudget ends a run that makes no progress
            callbacks=[FailureBudget(config, spec["state"])],  # type: ignore[list-item]
            worker_runtime_env={"env_vars": ray_init.worker_env()},
        ),
    )


def work(spec: dict[str, Any]) -> None:
    """The main function of a worker: train one run, or, if workers are persistent, run after run."""
    state, number = spec["state"], 0
    ended, informed = None, ""
    if not spec["verbose"]:
        logging.getLogger("ray").setLevel(logging.ERROR)
    state.set.remote(run_state.PLACE, ray.util.get_current_placement_group())
    while True:
        run, life = ray.get(state.next_run.remote(number))
        if run == "leave":
            return
        if run == "wait":
            if ended is not None and life != informed:  # a restarted actor does not know it
                informed = ray.get(state.ended.remote(number, ended))
            time.sleep(RUN_POLL_S)
            continue
        number = run.number
        ended = _run_one(**ray.get(run.what), spec=spec)
        if ended is not None:
            informed = ray.get(state.ended.remote(number, ended))
        reason = ray.get(state.snapshot.remote()).get(run_state.STOP)
        if not spec["persistent"] or reason in run_state.ENDS_GROUP:
            return


def _run_one(
    config: Config, data_set: DataSet, run: Run, tags: Mapping[str, str], spec: dict[str, Any]
) -> int | None:
    """Train one run on this worker; rank 0 returns images_seen at the end."""
    state = spec["state"]
    buffer = SharedBuffer(state)
    buffer.tags({**tags, "hardware": hardware()})
    buffer.data_set(_data_set_input(config, data_set))
    buffer.artifact("config.json", to_json(config).encode())
    runtime = RayRuntime(config, data_set, run, state, buffer, spec["folder"])
    images_seen = -1
    try:
        images_seen = loop.train(config, runtime, buffer).images_seen
    except UserError as error:
        ray.get(state.set.remote(run_state.FAILURE, error))
        runtime.flush_on_error()
        # All workers detect a loss that is not finite in the same step, so the group can stay.
        if not (spec["persistent"] and isinstance(error, loop.NonFinite)):
            raise
    finally:
        runtime.close()
        if config.train.compile:  # else the next run's net would count as a recompilation
            torch.compiler.reset()
    return images_seen if runtime.rank == 0 else None


def _data_set_input(config: Config, data_set: DataSet) -> DataSetInput:
    """The description of the data for MLflow."""
    manifest, rows = data_set.manifest, data_set.rows
    profile = {"split": data_set.split, "images": rows.num_rows, "shape": data_set.shape}
    profile |= {"classes": len(manifest.class_names), "fingerprint": rows.fingerprint}
    uri = data_set.location.uri
    return DataSetInput(manifest.source, rows.fingerprint[:32], uri, json.dumps(profile))
