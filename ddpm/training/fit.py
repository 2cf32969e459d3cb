"""Training on Ray: `fit` runs the loop on a worker group (worker_group.py), and recovers from failures.

The driver checks the run before anything is started, then monitors it (monitor.py). Rank 0 stores checkpoints in the
background (store.py). A restarted group, a new driver and a new cluster resume from the newest one in storage. Ray
Train starts worker groups, detects deaths, and restarts the group, smaller or larger.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray.exceptions

from ddpm.checkpoints import checkpoint, runs
from ddpm.checkpoints.runs import Run
from ddpm.cluster import resources
from ddpm.config import Config
from ddpm.data.plan import uneven_share
from ddpm.data.reading import DataSet
from ddpm.storage import locations
from ddpm.storage.driver_lock import DriverLock
from ddpm.tracking import pages, run_params, spool
from ddpm.tracking.mlflow_client import database_file, tracking_uri, without_password
from ddpm.tracking.mlflow_runs import Address
from ddpm.tracking.uploader import DELIVERY_TIMEOUT_S, Delivery, Uploader
from ddpm.training import checkpoint_manager
from ddpm.training.failures import TrainingFailed, last_line
from ddpm.training.monitor import DriverMonitor, ShouldContinue
from ddpm.training.worker_group import WorkerGroup
from ddpm.utils import command_line
from ddpm.utils.errors import UserError
from ddpm.utils.retry import StorageError, retry_io

log = logging.getLogger(__name__)

HASTY_DELIVERY_TIMEOUT_S = 1.0
"""Time-out for delivery to MLflow at the end of a run that was asked to stop, or whose storage failed."""
STATUS_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    run: Run
    images_seen: int
    checkpoint: str | None
    """URI of the newest checkpoint; None: the run was stopped before its first step."""
    delivery: Delivery | None
    """The outcome of delivery to MLflow; None: the run was already finished, and no records were left."""
    signal: int | None = None
    """The signal that stopped the run early."""
    was_finished: bool = False
    """Whether there was nothing to train."""


def fit(
    config: Config,
    data_set: DataSet,
    *,
    verbose: bool = False,
    should_continue: ShouldContinue = lambda values: True,
    parent_run_id: str | None = None,
    group: WorkerGroup | None = None,
    trained: Callable[[], object] = lambda: None,
) -> Result:
    """Train the run of `config` on the connected Ray cluster, from its newest checkpoint to the end.

    Args:
        config: checked by `loop.check`; with run.name, and absolute run.storage and data.shards.
        data_set: the split to train on.
        verbose: show Ray's own messages.
        should_continue: called twice a second with the run's state; if it returns False, training ends after the
            current step, with a checkpoint.
        parent_run_id: the MLflow run that this one is shown under; its command resumes this run.
        group: workers that stay from one run to the next; None: start workers for this run only.
        trained: called when the workers are free again; delivery to MLflow may still be under way.
    """
    per_worker = resources.resources_per_worker(config)
    resources.check_storage(config)
    cpus, gpus = per_worker["CPU"], per_worker.get("GPU", 0)
    print(f"workers     {config.cluster.num_workers}, with {cpus:g} CPUs and {gpus:g} GPUs each", flush=True)
    assert config.run.name is not None, "runs.with_name_and_storage names a run"
    folder = locations.resolve(config.run.storage).child(config.run.name)
    with DriverLock(folder, "run", "--run.name", log.warning) as lock:
        for warning in filter(None, (resources.crowding(config, per_worker), uneven_share(config))):
            print(f"warning: {warning}", file=sys.stderr)
        run = runs.open_run(config.run.name, config.run.storage)
        seen = _begins_at(config, data_set, run)
        is_finished = seen >= config.train.total_images
        done = partial(Result, run, seen, runs.checkpoints(run.location)[-1].uri if is_finished else None)
        if is_finished and _is_known(run, seen):
            return done(None, was_finished=True)
        address = Address(tracking_uri(), config.run.experiment, run.name, run.key, parent_run_id)
        uploader = Uploader(address, run_params.params(config), run.location.child(spool.FOLDER))
        uploader.committed(seen)
        if is_finished:  # its driver was killed, or MLflow was away
            _store_status(run, "FINISHED", seen)
            return done(uploader.close("FINISHED"), was_finished=True)
        group = group or WorkerGroup(config, verbose)
        command = None if parent_run_id else command_line.typed()
        group.submit(config, data_set, run, run_params.tags(config, command))

        def continues(values: Mapping[str, Any]) -> bool:
            return should_continue(values) and not lock.is_lost

        monitor = DriverMonitor(config, group, uploader, max(seen, 0), continues)
        ended, delivery = _drive(config, run, monitor, uploader, lock, trained)
        find = partial(runs.checkpoints, run.location)
        newest = retry_io(find, where=run.location.uri, timeout_s=config.run.storage_timeout_s)[-1:]
        stopped_by = monitor.signal if ended < config.train.total_images else None
        return Result(run, ended, newest[0].uri if newest else None, delivery, stopped_by)


def _drive(
    config: Config,
    run: Run,
    monitor: DriverMonitor,
    uploader: Uploader,
    lock: DriverLock,
    trained: Callable[[], object],
) -> tuple[int, Delivery]:
    """Train, record how it ended, and deliver what is left to MLflow; returns images_seen too."""
    status: str | None = "FAILED"
    ended, timeout_s = None, DELIVERY_TIMEOUT_S
    try:
        with monitor:
            ended = monitor.train()
        lock.check()
        uploader.committed(ended)  # the run-state actor may have died before it reported this
        trained()
        status = "FINISHED"
        if monitor.was_asked and ended < config.train.total_images:
            # A run that was ended early is not resumed.
            status = "KILLED" if monitor.ended_early else pages.STOPPED
    except ray.exceptions.RayError as error:
        gone = f"the Ray cluster is gone: {last_line(error)}"
        raise TrainingFailed(f"{gone}; run the same command again to resume") from None
    except KeyboardInterrupt:
        status = pages.STOPPED
        raise
    except StorageError:  # undelivered records are unreadable
        timeout_s = HASTY_DELIVERY_TIMEOUT_S
        raise
    finally:
        if monitor.signal:
            timeout_s = HASTY_DELIVERY_TIMEOUT_S
        if lock.is_lost:
            status = None  # it is the other driver's
        else:
            _store_status(run, status if status in ("FINISHED", "FAILED") else "STOPPED", ended)
        delivery = uploader.close(status, timeout_s)
    return ended, delivery


def _is_known(run: Run, seen: int) -> bool:
    """Whether status.json says that the run is finished, and all its records have been delivered."""
    with contextlib.suppress(OSError, UserError):  # storage does not answer, or status.json is damaged
        status = runs.read_status(run.location)
        is_said = status is None or status.status == "FINISHED"
        return is_said and not spool.count(run.location.child(spool.FOLDER), seen)
    return True


def _store_status(run: Run, status: Any, ended: int | None) -> None:
    """Write into status.json how the run ended, if training had begun; training does not depend on it."""
    retry = partial(retry_io, where=run.location.uri, timeout_s=STATUS_TIMEOUT_S)
    try:
        if written := retry(lambda: runs.read_status(run.location)):
            seen = max(written.images_seen, ended or 0)  # what is lost since is counted by the next start
            content = runs.status_json(replace(written, status=status, images_seen=seen))
            retry(lambda: run.location.child(runs.STATUS).write(content))
    except UserError as error:
        log.warning("%s is not written: %s", runs.STATUS, error)


def _begins_at(config: Config, data_set: DataSet, run: Run) -> int:
    """Position of the newest valid checkpoint; the first may be made here from train.init_from. -1: there is none."""
    with checkpoint_manager.latest_valid(run, config.run.storage_timeout_s, log.warning) as folder:
        if folder is None and config.train.init_from is not None:
            checkpoint_manager.begin(run, config, data_set.rows.fingerprint, log.warning)
            return 0
        if folder is None:
            return -1
        where = f"{run.location.uri}/{folder.name}"
        saved = checkpoint.read_config(folder)
        checkpoint.check_same_run(saved, config, where)
        position = checkpoint.read_state(folder)
    if position["data_fingerprint"] != data_set.rows.fingerprint:
        raise UserError(
            f"{where} was trained on other data, {saved.data.shards} (fingerprint "
            f"{position['data_fingerprint'][:12]}, now {data_set.rows.fingerprint[:12]}); go on with --data "
            f"{saved.data.shards}, not with --data.images or --data.source, or use another --run.name"
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
        if database := database_file(tracking_uri()):
            lines.append(f"            `{pages.ui_command(database)}` shows it at")
        if database or where.startswith("http"):
            server = pages.LOCAL_UI if database else where
            lines.append(f"            {pages.link(server, delivery.experiment_id, delivery.run_id)}")
    return lines
