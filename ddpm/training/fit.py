"""Training on Ray: `fit` runs the loop on a worker group (worker_group.py), and recovers from failures.

The driver checks the run before anything is started, then monitors it (monitor.py). Rank 0 stores checkpoints in the
background (store.py). A restarted group, a new driver and a new cluster resume from the newest one in storage. Ray
Train starts worker groups, detects deaths, and restarts the group, smaller or larger.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray.exceptions

from ddpm.cluster import ray_init, resources
from ddpm.config.json import from_json, to_json
from ddpm.config.tree import Config
from ddpm.data.plan import uneven_share
from ddpm.data.reading import DataSet
from ddpm.evaluation.rung import Rungs
from ddpm.runs import checkpoint, generations, run_folder, settings, storage
from ddpm.runs.generations import Superseded
from ddpm.runs.lock import DriverLock
from ddpm.runs.run_folder import Facts, RunFolder, RunStatus, Search, Status
from ddpm.tracking import mlflow_pages, run_params
from ddpm.tracking.mlflow_client import database_file, tracking_uri, without_password
from ddpm.tracking.pusher import PATIENCE_S, Delivery, NoPusher, Pusher
from ddpm.training import checkpoint_manager, duration
from ddpm.training.failures import TrainingFailed, last_line
from ddpm.training.footprint import footprint
from ddpm.training.monitor import DriverMonitor, ShouldContinue
from ddpm.training.worker_group import Task, WorkerGroup
from ddpm.utils import command_line
from ddpm.utils.errors import UserError
from ddpm.utils.retry import StorageError, as_user_error, retry_io

log = logging.getLogger(__name__)

HASTY_PATIENCE_S = 1.0
"""How long the end of a run waits for MLflow if the run was asked to stop, or its storage failed."""
STATUS_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    run: RunFolder
    images_seen: int
    checkpoint: str | None
    """URI of the newest checkpoint; None: the run was stopped before its first step."""
    delivery: Delivery | None
    """Whether MLflow has the run; None: run.tracking is none."""
    signal: int | None = None
    """The signal that stopped the run early."""
    was_finished: bool = False
    """Whether there was nothing to train."""


@dataclass(frozen=True)
class Origin:
    """What a run comes from."""

    preset: str
    changed: Mapping[str, Any]
    """`settings.differences` from the preset."""
    is_named: bool = True
    """Whether the user chose run.name. Otherwise a folder of that name must be of a run with the same differences."""
    search: Search | None = None
    """The search that the run is a trial of; its command resumes the run."""


def fit(
    config: Config,
    data_set: DataSet,
    origin: Origin | None = None,
    *,
    verbose: bool = False,
    should_continue: ShouldContinue = lambda values: True,
    rungs: Rungs | None = None,
) -> Result:
    """Train the run of `config` on the connected Ray cluster, from its newest checkpoint to the end.

    Args:
        config: checked by `loop.check`; with run.name, and absolute run.storage and data.shards. Its number of workers
            may be auto.
        data_set: the split to train on.
        origin: None: the nearest preset.
        verbose: show Ray's own messages.
        should_continue: called twice a second with the run's state; if it returns False, training ends after the
            current step, with a checkpoint.
        rungs: where the loop measures what ranks the trials of a search.
    """
    resources.check_storage(config)
    name = config.run.name
    assert name is not None, "a run has a name"
    folder = storage.resolve(config.run.storage).child(name)
    if origin is None:
        preset, changed = run_params.nearest_preset(config)
        origin = Origin(preset, changed)
    before = run_folder.find_card(folder)
    config = resources.with_workers(config, before.config.get("cluster", {}) if before else {})
    if before is None:
        resources.resources_per_worker(config)  # checks them before anything is written
    with DriverLock(folder, "run", "--run.name", log.warning) as lock:
        run = run_folder.open_run(name, config.run.storage, facts(config, data_set, origin))
        card = run_folder.read_card(run.location)
        version = card.versions.get(run_params.VERSION, "")
        if card.preset and not origin.is_named:
            settings.check_same(card.changed, origin.changed, run.location.uri, version)
        is_claimed = _claim(run, lock, unless_finished=config.train.total_images)
        seen = _begins_at(config, data_set, run, version, lock)
        if seen < 0 and card.config and not origin.is_named:
            began = from_json(json.dumps(card.config), f"{run.location.uri}/{run_folder.CARD}")
            checkpoint.check_same_run(began, config, run.location.uri)
        # The driver of a search pushes its trials.
        is_pushed = config.run.tracking == "mlflow" and origin.search is None
        pusher = Pusher(run) if is_pushed else NoPusher()
        if seen >= config.train.total_images:
            store_status(run, RunStatus.FINISHED, seen, lock.id)  # its driver may have been killed before
            newest = run_folder.checkpoints(run.location)[-1].uri
            return Result(
                run=run, images_seen=seen, checkpoint=newest, delivery=pusher.close(), was_finished=True
            )
        if not is_claimed:  # the last checkpoint of a finished run is damaged
            _claim(run, lock)

        def continues(values: Mapping[str, Any]) -> bool:
            lock.check()
            return should_continue(values)

        task = Task(config, data_set, run, lock.id, rungs)
        with contextlib.closing(WorkerGroup(task, verbose)) as group:
            _announce(config, group.per_worker)
            seen = max(seen, 0)
            monitor = DriverMonitor(config, group, pusher, images_seen=seen, should_continue=continues)
            ended, delivery = _drive(config, run, monitor, pusher, lock)
        find = partial(run_folder.checkpoints, run.location)
        stored = retry_io(find, where=run.location.uri, timeout_s=config.run.storage_timeout_s)
        return Result(
            run=run,
            images_seen=ended,
            checkpoint=stored[-1].uri if stored else None,
            delivery=delivery,
            signal=monitor.signal if ended < config.train.total_images else None,
        )


def _announce(config: Config, per_worker: dict[str, float]) -> None:
    """Print the number of workers, warnings about it, and what training takes."""
    cpus = per_worker["CPU"]
    gpus = per_worker.get("GPU", 0)
    print(f"workers     {config.cluster.num_workers}, with {cpus:g} CPUs and {gpus:g} GPUs each", flush=True)
    long = None if gpus else duration.warning(config, ray_init.resources().get("CPU", 1.0))
    for warning in (resources.crowding(config, per_worker), uneven_share(config), long):
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr)
    print(f"net         {footprint(config)}", flush=True)


def facts(config: Config, data_set: DataSet, origin: Origin) -> Facts:
    """What run.json tells of a new run."""
    rows = data_set.rows
    data = run_folder.Data(
        source=data_set.manifest.source,
        fingerprint=rows.fingerprint,
        uri=data_set.location.uri,
        split=data_set.split,
        num_images=rows.num_rows,
        shape=data_set.shape,
        num_classes=len(data_set.manifest.class_names),
    )
    return Facts(
        preset=origin.preset,
        changed=dict(origin.changed),
        config=json.loads(to_json(config)),
        data=data,
        command="" if origin.search else command_line.typed(),
        versions=run_params.versions(),
        search=origin.search,
    )


def _drive(
    config: Config,
    run: RunFolder,
    monitor: DriverMonitor,
    pusher: Pusher,
    lock: DriverLock,
) -> tuple[int, Delivery | None]:
    """Train, record how the run ended, and push it to MLflow; returns images_seen too."""
    status = RunStatus.FAILED
    ended = None
    patience_s = PATIENCE_S
    try:
        with monitor:
            ended = monitor.supervise()
        lock.check()
        status = RunStatus.FINISHED
        if monitor.stop_requested and ended < config.train.total_images:
            status = RunStatus.PRUNED if monitor.ended_early else RunStatus.STOPPED
    except ray.exceptions.RayError as error:
        gone = f"the Ray cluster is gone: {last_line(error)}"
        raise TrainingFailed(f"{gone}; run the same command again to resume") from None
    except KeyboardInterrupt:
        status = RunStatus.STOPPED
        raise
    except (StorageError, Superseded):  # the folder cannot be read, or is another driver's
        patience_s = HASTY_PATIENCE_S
        raise
    finally:
        if monitor.signal:
            patience_s = HASTY_PATIENCE_S
        store_status(run, status, ended, lock.id)
        delivery = pusher.close(patience_s)
    return ended, delivery


def _claim(run: RunFolder, lock: DriverLock, unless_finished: int | None = None) -> bool:
    """Claim the run: from now on workers of another driver, which had the lock before, store nothing that counts.

    Args:
        unless_finished: leave a run as it is that has finished with so many images, and return False.
    """
    with as_user_error(f"cannot read or write {run.location.uri}"):
        status = run_folder.read_status(run.location)
        finished = status.images_seen if status and status.status == RunStatus.FINISHED else 0
        if unless_finished is not None and finished >= unless_finished:
            return False
        is_exclusive = generations.Writer(run.location, lock.id, lock.id).claim()
    if not is_exclusive:
        log.warning(
            "%s: this storage has no conditional writes (or no file locks), so a driver that was suspended and wakes "
            "up beside its successor may damage the run",
            run.location.uri,
        )
    return True


def store_status(
    run: RunFolder, status: RunStatus, ended: int | None = None, driver: str | None = None
) -> None:
    """Write into status.json how the run ended; training does not depend on it.

    Args:
        ended: images_seen at the end, if it is known.
        driver: id of the lock of the run's driver; nothing is written if another one has claimed the run. None: the
            caller is the driver of a search.

    A run that was stopped before its first step has no status.json: it has not begun.
    """

    def change(before: Status | None) -> Status | None:
        if driver is not None and generations.read(run.location).driver != driver:
            return None
        if before is None and status == RunStatus.FAILED:
            before = Status(RunStatus.RUNNING, images_seen=0, images_lost=0, minutes=0.0)
        if before is None or before.status == status:
            return None
        seen = max(before.images_seen, ended or 0)  # what is lost since is counted by the next start
        return replace(before, status=status, images_seen=seen, ended_ms=int(time.time() * 1000))

    try:
        write = partial(run_folder.replace_status, run.location, change)
        retry_io(write, where=run.location.uri, timeout_s=STATUS_TIMEOUT_S)
    except UserError as error:
        log.warning("%s is not written: %s", run_folder.STATUS, error)


def _begins_at(config: Config, data_set: DataSet, run: RunFolder, version: str, lock: DriverLock) -> int:
    """Position of the newest valid checkpoint; the first may be made here from train.init_from. -1: there is none."""
    timeout_s = config.run.storage_timeout_s
    found = retry_io(lambda: generations.read(run.location), where=run.location.uri, timeout_s=timeout_s)
    with checkpoint_manager.latest_valid(run, found, timeout_s, log.warning) as folder:
        if folder is None and config.train.init_from is not None:
            classes = data_set.manifest.class_names
            checkpoint_manager.begin(run, lock.id, config, data_set.rows.fingerprint, log.warning, classes)
            return 0
        if folder is None:
            return -1
        where = f"{run.location.uri}/{folder.name}"
        saved = checkpoint.read_config(folder)
        checkpoint.check_same_run(saved, config, f"{where}, made by version {version or 'unknown'},")
        saved_state = checkpoint.read_state(folder)
    if saved_state["data_fingerprint"] != data_set.rows.fingerprint:
        raise UserError(
            f"{where} was trained on other data, {saved.data.shards} (fingerprint "
            f"{saved_state['data_fingerprint'][:12]}, now {data_set.rows.fingerprint[:12]}); go on with --data "
            f"{saved.data.shards}, not with --data.images or --data.source, or use another --run.name"
        )
    return saved_state["images_seen"]


def summary(result: Result) -> list[str]:
    """Lines that tell the user where checkpoints, samples and curves are."""
    folder = result.run.location.uri
    delivery = result.delivery
    lines = [f"checkpoint  {result.checkpoint}"] if result.checkpoint else []
    samples = result.run.location.child(run_folder.SAMPLES).child("latest.png")
    with contextlib.suppress(OSError):
        if samples.exists():  # the first checkpoint may exist before the first grid
            lines.append(f"samples     {samples.uri}")
    if delivery is None or (result.signal and not result.checkpoint):
        return lines
    pushed = delivery.pushed
    where = without_password(tracking_uri())
    if not delivery.is_complete or pushed is None:
        lines.append(f"MLflow      {where} lacks a part; `ddpm sync {folder}` sends it")
        return lines
    lines.append(f"MLflow      run {pushed.run_id} in {where}")
    database = database_file(tracking_uri())
    if database is not None:
        lines.append(f"            `{mlflow_pages.ui_command(database)}` shows it at")
    if database or where.startswith("http"):
        server = mlflow_pages.LOCAL_UI if database else where
        lines.append(f"            {mlflow_pages.link(server, pushed.experiment_id, pushed.run_id)}")
    return lines
