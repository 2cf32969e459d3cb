"""The workers of a training run: a `TorchTrainer`. failures.py decides what happens to a run when workers die."""

import logging
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.util
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddpm.cluster import ray_init, resources
from ddpm.config.tree import Config
from ddpm.data.reading import DataSet
from ddpm.evaluation.rung import Rungs
from ddpm.runs.run_folder import RunFolder
from ddpm.training import loop, run_state
from ddpm.training.failures import RestartPolicy
from ddpm.training.run_state import RunState
from ddpm.training.store import RunStore
from ddpm.training.worker import RayRuntime
from ddpm.utils import devices, exits
from ddpm.utils.errors import UserError

NEVER_S = 1e9


@dataclass(frozen=True)
class Task:
    """What the workers of a group train."""

    config: Config
    data_set: DataSet
    run: RunFolder
    driver: str
    """Id of the lock of the driver, which has claimed the run."""
    rungs: Rungs | None
    """Where the loop measures what ranks the trials of a search; None: the run is no trial."""


class RunStateClient:
    """A RunState, started on this node. Calls raise one of failures.DEATHS once it has died.

    Attributes:
        actor: the RunState, for controller and workers.
        values: all values by subject, as they were read last.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.actor = _start_run_state({})

    def set(self, subject: str, value: Any) -> None:
        """`RunState.set`."""
        ray.get(self.actor.set.remote(subject, value))
        self.values[subject] = value

    def snapshot(self) -> dict[str, Any]:
        """All values by subject."""
        self.values = ray.get(self.actor.snapshot.remote())
        return dict(self.values)

    def renew(self, changes: Mapping[str, Any]) -> None:
        """Start another RunState, with the values that were read last, and with `changes`."""
        self.values = {**self.values, **changes}
        self.actor = _start_run_state(self.values)


def _start_run_state(values: Mapping[str, Any]) -> Any:
    """Create a RunState on this node; it lives at most as long as this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(RunState).options(scheduling_strategy=here).remote(values)


class WorkerGroup:
    """The workers of a run, which start again after a failure.

    Args:
        verbose: show Ray's own messages.

    Attributes:
        state: the driver's side of the RunState actor.
        per_worker: CPUs and GPUs of each worker, {"CPU": 1.0, "GPU": 1.0}.
        result: what `TorchTrainer.fit` returned last.
        error: what it raised, after the workers have left; else None.
    """

    def __init__(self, task: Task, verbose: bool = False) -> None:
        self.state = RunStateClient()
        self.per_worker = resources.resources_per_worker(task.config)
        self._config = task.config
        # A reference: Ray Train does not copy it to the controller.
        self._task = ray.put(task)
        self._verbose = verbose
        self._folder = tempfile.mkdtemp(prefix="ddpm-ray-train-")
        self.result: ray.train.Result | None = None
        self.error: BaseException | None = None
        self._workers: threading.Thread | None = None

    def workers(self) -> threading.Thread:
        """The thread that runs `TorchTrainer.fit`, started if there is none; it ends when the workers leave.

        In the main thread Ray Train would install a handler for Ctrl-C, and Python would not handle signals during a
        call into Ray.
        """
        if self._workers is None or not self._workers.is_alive():
            # Data tasks would wait forever for the CPUs of a dead controller's workers: Ray's own cleanup asks the
            # dashboard whether the controller lives, and does nothing without one (Ray 2.60).
            placement_group = self.state.values.get(run_state.PLACEMENT_GROUP)
            if self._workers is not None and placement_group is not None:
                ray.util.remove_placement_group(placement_group)
            self.error = None
            self._workers = threading.Thread(target=self._fit, name="ddpm-fit", daemon=True)
            exits.calls.append(self._workers)
            self._workers.start()
        return self._workers

    def close(self) -> None:
        """Remove Ray Train's files; the workers have left, or need not be waited for."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _fit(self) -> None:
        try:
            self.result = self._trainer(tempfile.mkdtemp(dir=self._folder)).fit()
        except BaseException as error:  # of any type: failures.decide says what follows
            self.error = error

    def _trainer(self, folder: str) -> TorchTrainer:
        config = self._config
        sizes = config.cluster.world_sizes()
        return TorchTrainer(
            train_worker,
            train_loop_config={
                "task": self._task,
                "state": self.state.actor,
                "folder": folder,
                "verbose": self._verbose,
            },
            scaling_config=ScalingConfig(  # type: ignore[call-arg]  # type checkers see that of Ray Train's version 1
                num_workers=sizes[0] if len(sizes) == 1 else (sizes[0], sizes[-1]),  # type: ignore[arg-type]
                use_gpu="GPU" in self.per_worker,
                resources_per_worker=self.per_worker,
                # Ray would stop a healthy group at once, and the next group would resume from an older checkpoint. The
                # driver asks the group to leave with a new checkpoint instead (monitor.py).
                elastic_resize_monitor_interval_s=NEVER_S,
            ),
            run_config=RunConfig(  # type: ignore[call-arg]
                name=config.run.name,
                # Ray's own files stay on this node: a run resumes from its own folder, and a failed write of Ray's to
                # remote storage would end the run. Checkpoints are reported as pointers (worker.py).
                storage_path=folder,
                failure_config=FailureConfig(max_failures=-1),  # RestartPolicy ends a run without progress
                callbacks=[RestartPolicy(config, self.state.actor)],  # type: ignore[list-item]
                worker_runtime_env={"env_vars": ray_init.worker_env()},
            ),
        )


def train_worker(given: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`: train the run."""
    if not given["verbose"]:
        logging.getLogger("ray").setLevel(logging.ERROR)
    state = given["state"]
    state.set.remote(run_state.PLACEMENT_GROUP, ray.util.get_current_placement_group())
    ended = train_run(ray.get(given["task"]), state, given["folder"])
    if ended is not None:
        ray.get(state.set.remote(run_state.ENDED, ended))


def train_run(task: Task, state: Any, folder: str) -> int | None:
    """Train a run on this worker; rank 0 returns images_seen at the end, None if it was stopped before the first step.

    Args:
        state: the run's RunState actor.
        folder: Ray Train's storage_path, on the driver's node.
    """
    store = None
    if ray.train.get_context().get_world_rank() == 0:
        fingerprint = task.data_set.rows.fingerprint
        classes = task.data_set.manifest.class_names
        hardware = devices.hardware()
        notify = state.set.remote
        store = RunStore(task.config, task.run, fingerprint, notify, hardware, classes, driver=task.driver)
    runtime = RayRuntime(task.config, task.data_set, task.run, state, store, folder)
    runtime.rungs = task.rungs
    try:
        if not runtime.is_wanted():
            return None
        images_seen = loop.train(task.config, runtime).images_seen
        if (
            not runtime.takes_steps
        ):  # stopped before the first step: another driver may have the run's folder by now
            return None
        if store is not None:
            store.flush()
        runtime.report()  # the last checkpoint
    except UserError as error:
        ray.get(state.set.remote(run_state.FAILURE, error))
        if store is not None:
            store.flush_on_error()
        if isinstance(error, loop.NonFinite):
            # All workers raise it, and the first to leave would end rank 0's writes.
            ray.train.collective.barrier()
        raise
    finally:
        runtime.close()
        if store is not None:
            store.close()
    return images_seen if store is not None else None
