"""Training on Ray: `fit` runs the loop on a worker group (worker_group.py), and recovers from failures.

The driver checks the run before anything is started, then monitors it. Rank 0 stores checkpoints in the background
(checkpoint_manager.py). A restarted group, a new driver and a new cluster resume from the newest one in storage. Ray
Train starts worker groups, detects deaths, and restarts the group, smaller or larger.
"""

import atexit
import contextlib
import logging
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.exceptions

from ddpm.checkpoints import checkpoint, runs
from ddpm.checkpoints.runs import Run
from ddpm.cluster import resources
from ddpm.config import Config
from ddpm.data.reading import DataSet
from ddpm.storage import locations
from ddpm.storage.driver_lock import DriverLock
from ddpm.tracking import pages, spool
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.mlflow_runs import Address
from ddpm.tracking.retry import without_password
from ddpm.tracking.uploader import DELIVERY_TIMEOUT_S, Delivery, Uploader
from ddpm.training import checkpoint_manager, run_state
from ddpm.training.failures import TrainingFailed, last_line, too_many_preemptions
from ddpm.training.gauges import Gauges
from ddpm.training.monitor import DriverMonitor, ShouldContinue
from ddpm.training.screen import Screen
from ddpm.training.worker_group import PersistentWorkerGroup
from ddpm.utils.errors import UserError
from ddpm.utils.retry import StorageError

log = logging.getLogger(__name__)

HASTY_DELIVERY_TIMEOUT_S = 1.0
"""Time-out for delivery to MLflow at the end of a run that was asked to stop, or whose storage failed."""
LEAVING_S = 5.0
"""Time-out for Ray Train's end when the process exits; two seconds are usual."""


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    run: Run
    images_seen: int
    checkpoint: str | None
    """URI of the newest checkpoint; None: the run was stopped before its first step."""
    delivery: Delivery | None
    """The outcome of delivery to MLflow; None: the run was already finished."""
    signal: int | None = None
    """The signal that asked the run to stop."""


def fit(
    config: Config,
    data_set: DataSet,
    *,
    verbose: bool = False,
    should_continue: ShouldContinue = lambda values: True,
    parent_run_id: str | None = None,
    group: PersistentWorkerGroup | None = None,
    trained: Callable[[], object] = lambda: None,
) -> Result:
    """Train the run of `config` on the connected Ray cluster, from its newest checkpoint to the end.

    Args:
        config: checked by `loop.check`; with run.name, and absolute run.storage and data.shards.
        data_set: the split to train on.
        verbose: show Ray's own messages.
        should_continue: called twice a second with the run's state; if it returns False, training ends after the
            current step, with a checkpoint.
        parent_run_id: the MLflow run that this one is shown under.
        group: workers that stay from one run to the next; None: start workers for this run only.
        trained: called when the workers are free again; delivery to MLflow may still be under way.

    Raises:
        UserError: the config does not fit the cluster or the run's earlier config, or another process drives the
            run.
        TrainingFailed: workers failed too often.
    """
    per_worker = resources.resources_per_worker(config)
    resources.check_storage(config)
    cpus, gpus = per_worker["CPU"], per_worker.get("GPU", 0)
    print(f"workers     {config.cluster.num_workers}, with {cpus:g} CPUs and {gpus:g} GPUs each", flush=True)
    assert config.run.name is not None, "runs.settled names a run"
    folder = locations.resolve(config.run.storage).child(config.run.name)
    with DriverLock(folder, "run", "--run.name", log.warning) as lock:
        if warning := resources.crowding(config, per_worker):
            print(f"warning: {warning}", file=sys.stderr)
        run = runs.open_run(config.run.name, config.run.storage)
        total_images = config.train.total_images
        seen = _begins_at(config, data_set, run)
        if seen >= total_images:
            return Result(run, seen, runs.checkpoints(run.location)[-1].uri, None)
        address = Address(tracking_uri(), config.run.experiment, run.name, run.key, parent_run_id)
        uploader = Uploader(address, pages.params(config), run.location.child(spool.FOLDER), at_once=False)
        uploader.committed(seen)
        gauges = Gauges(run.name, total_images, max(seen, 0), lambda: uploader.waiting)

        def look(values: Mapping[str, Any]) -> bool:
            gauges.update(values)
            if run_state.PROGRESS in values and monitor.signal is None:  # not before the first step
                uploader.begin()
            return should_continue(values) and not lock.is_lost

        group = group or PersistentWorkerGroup(config, verbose, persistent=False)
        is_elastic = len(config.cluster.world_sizes()) > 1
        possible = partial(resources.possible_workers, config, group.per_worker) if is_elastic else None
        screen = Screen(run.name, total_images, lambda: uploader.waiting)
        every_s = config.cluster.resize_interval_s
        monitor = DriverMonitor(group.state, screen, uploader.committed, look, possible, every_s)
        status, timeout_s = "FAILED", DELIVERY_TIMEOUT_S
        try:
            # A trial is resumed by its search's command.
            command = None if parent_run_id else shlex.join(["python", *sys.argv])
            group.submit(config, data_set, run, pages.tags(config, command))
            with monitor:
                ended = _train(config, group, monitor)
            if ended is None:
                ended = max(seen, 0)
            lock.check()
            uploader.committed(ended)  # the run-state actor may have died before it reported this
            trained()
            status = "KILLED" if monitor.was_asked else "FINISHED"
        except ray.exceptions.RayError as error:
            gone = f"the Ray cluster is gone: {last_line(error)}"
            raise TrainingFailed(f"{gone}; run the same command again to resume") from None
        except (KeyboardInterrupt, StorageError):  # if storage fails, undelivered records are unreadable
            timeout_s = HASTY_DELIVERY_TIMEOUT_S
            raise
        finally:
            if monitor.signal:
                timeout_s = HASTY_DELIVERY_TIMEOUT_S
            delivery = uploader.close(status, timeout_s)
        newest = runs.checkpoints(run.location)[-1:]
        return Result(run, ended, newest[0].uri if newest else None, delivery, monitor.signal)


def _train(config: Config, group: PersistentWorkerGroup, monitor: DriverMonitor) -> int | None:
    """Wait until training is done or stopped; returns images_seen, or None if it stopped before the first step.

    This takes one or more Ray Train runs: workers leave before a node is taken away, and when nodes have joined.
    """
    state = group.state

    def is_over(values: Mapping[str, Any]) -> bool:
        ended, failed = values.get(run_state.ENDED), values.get(run_state.FAILURE) is not None
        return ended is not None and (ended >= config.train.total_images or monitor.was_asked or failed)

    def may_leave(values: Mapping[str, Any]) -> bool:
        is_waited_for = not group.persistent and monitor.signal is None  # until the workers have left
        return monitor.is_before_first_step(values) or (not is_waited_for and is_over(values))

    while True:
        workers = group.workers()
        monitor.run(workers, may_leave)
        values, failure = state.snapshot(), workers.error
        if values.get(run_state.FAILURE) is not None:
            raise values[run_state.FAILURE]
        if is_over(values):
            if not group.persistent:
                # After a signal the thread is still in Ray Train, and a process that exits while a thread is in a call
                # into Ray may crash (2.60). This is called before Ray's own handler, which was registered earlier.
                atexit.register(workers.join, LEAVING_S)
            return values[run_state.ENDED]
        if monitor.is_before_first_step(values):
            return None
        if failure is None and values.get(run_state.ENDED) is None:
            log.warning(
                "the run-state actor died when the workers stopped; new workers start, and check what is left to do"
            )
            continue
        if failure is None and values.get(run_state.STOP) == run_state.MORE_WORKERS:
            log.warning(
                "nodes have joined; continuing with more workers, at %s images", values[run_state.ENDED]
            )
        elif failure is None:  # a node is about to be taken away: the workers left in good order
            if state.preempted() > config.cluster.max_preemptions:
                raise too_many_preemptions(config)
            log.warning(
                "a node is about to be preempted; continuing on other nodes, at %s images",
                values[run_state.ENDED],
            )
        elif not isinstance(failure, ray.exceptions.ActorDiedError):
            raise TrainingFailed(f"training failed: {last_line(failure)} (--verbose shows tracebacks)")
        elif state.failed() > config.cluster.max_failures:
            raise TrainingFailed(f"training failed: {last_line(failure)}")
        else:  # Ray Train does not restart a controller that died (2.60); the next iteration does
            log.warning("Ray Train's controller died; a new one resumes from the last checkpoint")
        state.set(run_state.ENDED, None)
        if not monitor.was_asked:
            state.set(run_state.STOP, None)


def _begins_at(config: Config, data_set: DataSet, run: Run) -> int:
    """Position of the newest valid checkpoint; the first may be made here from train.init_from. -1: there is none.

    Raises:
        UserError: the run was begun with another configuration, or on other data.
    """
    with checkpoint_manager.latest_valid(run.location, config.run.storage_timeout_s, log.warning) as folder:
        if folder is None and config.train.init_from is not None:
            identity = {"run_key": run.key, "data_fingerprint": data_set.rows.fingerprint}
            checkpoint_manager.begin(run.location, config, identity, log.warning)
            return 0
        if folder is None:
            return -1
        where = f"{run.location.uri}/{folder.name}"
        checkpoint.check_same_run(checkpoint.read_config(folder), config, where)
        position = checkpoint.read_state(folder)
    if position["data_fingerprint"] != data_set.rows.fingerprint:
        raise UserError(
            f"{where} was trained on other data (fingerprint {position['data_fingerprint'][:12]}, now "
            f"{data_set.rows.fingerprint[:12]}); use that data set, or another --run.name"
        )
    return position["images_seen"]


def summary(result: Result) -> list[str]:
    """Lines that tell the user where checkpoints, samples and curves are."""
    folder, delivery = result.run.location.uri, result.delivery
    lines = [f"checkpoint  {result.checkpoint}"] if result.checkpoint else []
    samples = result.run.location.child("samples").child("latest.png")
    with contextlib.suppress(OSError):
        if samples.exists():  # the first checkpoint may exist before the first grid
            lines.append(f"samples     {samples.uri}")
    if delivery is None or (result.signal and not result.checkpoint):
        return lines
    where = without_password(tracking_uri())
    if delivery.undelivered:
        lines.append(
            f"MLflow      {delivery.undelivered} records could not be delivered to {where}; they are kept in "
            f"{folder}/{spool.FOLDER}, and `python jobs/sync.py {folder}` delivers them"
        )
    elif not delivery.ended:
        later = f"`python jobs/sync.py {folder}` reports it"
        if result.signal:  # sync.py sets the status of finished runs only
            later = "it will once the run has been resumed"
        lines.append(f"MLflow      {where} does not know yet how the run ended; {later}")
    else:
        lines.append(f"MLflow      run {delivery.run_id} in {where}")
        if where.startswith("http"):
            lines.append(f"            {pages.link(where, delivery.experiment_id, delivery.run_id)}")
    return lines
