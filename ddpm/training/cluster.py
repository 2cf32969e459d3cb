"""Training on Ray: `fit` runs the loop on the workers of a Ray Train group (troupe.py), through whatever dies.

The driver checks everything that can be checked before anything is started, then watches. Checkpoints do not go
through `ray.train.report`: rank 0 stores them in the background (keeper.py), a restarted group looks for the
newest one in storage, and so do a new driver and a new cluster. Of Ray Train there remains what it is best at:
starting worker groups, noticing deaths, and starting the group again, smaller or larger.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from ddpm import config as configs
from ddpm import runs, segments, storage
from ddpm.config import Config, UserError
from ddpm.data.reading import DataSet
from ddpm.delivery import Courier, Delivery
from ddpm.driver_lock import DriverLock
from ddpm.runs import Run
from ddpm.tracking import Address, tracking_uri, without_password
from ddpm.training import board as boards
from ddpm.training import checkpoint, keeper, placement
from ddpm.training.controller import TrainingFailed, last_line, too_many_preemptions
from ddpm.training.troupe import Troupe
from ddpm.training.watch import GoesOn, Watch, always

log = logging.getLogger(__name__)

DELIVERY_TIMEOUT_S = 30.0
"""What MLflow has not taken so long after the end is left to jobs/track.py."""
HASTY_DELIVERY_TIMEOUT_S = 1.0
"""Of a run that was asked to stop: who asked will not wait."""


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    run: Run
    images_seen: int
    checkpoint: str | None
    """URI of the newest checkpoint; None: the run was stopped before its first step."""
    delivery: Delivery | None
    """How tracking ended; None: nothing was left to do."""
    signal: int | None = None
    """What asked it to stop before its end."""


def fit(
    config: Config,
    data_set: DataSet,
    *,
    verbose: bool = False,
    goes_on: GoesOn = always,
    parent_run_id: str | None = None,
    troupe: Troupe | None = None,
    trained: Callable[[], object] = lambda: None,
) -> Result:
    """Train the run that `config` names to the end on the connected Ray cluster, from its newest checkpoint on.

    Args:
        config: checked by `loop.check`; with run.name, and absolute run.storage and data.shards.
        data_set: the split to train on.
        verbose: let Ray's own messages through.
        goes_on: asked twice a second, with what is on the board; if not, training ends with its step, and a checkpoint.
        parent_run_id: the MLflow run that this one is shown under.
        troupe: workers that stay from one run to the next; None: this run's own.
        trained: told when the workers are free again; MLflow may not have been told everything yet.

    Raises:
        UserError: the config does not fit the cluster, or what the run has begun with, or another process drives the
            run.
        TrainingFailed: workers failed too often.
    """
    resources = placement.resources_per_worker(config)
    placement.check_storage(config)
    cpus, gpus = resources["CPU"], resources.get("GPU", 0)
    print(f"workers     {config.cluster.num_workers}, of {cpus:g} CPUs and {gpus:g} GPUs each", flush=True)
    assert config.run.name is not None, "runs.settled names a run"
    folder = storage.resolve(config.run.storage).child(config.run.name)
    with DriverLock(folder, "run", "--run.name", log.warning) as lock:
        if warning := placement.crowding(config, resources):
            print(f"warning: {warning}", file=sys.stderr)
        return _fit(config, data_set, lock, verbose, goes_on, parent_run_id, troupe, trained)


def _fit(
    config: Config,
    data_set: DataSet,
    lock: DriverLock,
    verbose: bool,
    goes_on: GoesOn,
    parent_run_id: str | None,
    troupe: Troupe | None,
    trained: Callable[[], object],
) -> Result:
    """`fit`, of a run that no other process drives."""
    assert config.run.name is not None
    run = runs.open_run(config.run.name, config.run.storage)
    total_images = config.train.total_images
    seen = _images_seen(config, data_set, run)
    if seen >= total_images:
        return Result(run, seen, runs.checkpoints(run.location)[-1].uri, None)
    if seen < 0 and config.train.init_from is not None:
        identity = {"run_key": run.key, "data_fingerprint": data_set.rows.fingerprint}
        keeper.begin(run.location, config, identity, log.warning)
        seen = 0
    address = Address(tracking_uri(), config.run.experiment, run.name, run.key, parent_run_id)
    courier = Courier(address, configs.flatten(config), run.location.child(segments.FOLDER), at_once=False)
    courier.committed(seen)

    def look(notes: Mapping[str, Any]) -> bool:
        if (
            boards.PROGRESS in notes and watch.signal is None
        ):  # from the first step on, which it shall not delay
            courier.begin()
        return goes_on(notes) and not lock.is_lost

    troupe = troupe or Troupe(config, verbose, stays=False)
    status, watch = "FAILED", Watch(troupe.board, total_images, courier.committed, look)
    patience_s = DELIVERY_TIMEOUT_S
    try:
        troupe.begin(config, data_set, run)
        with watch:
            ended = _train(config, troupe, watch)
        if ended is None:
            ended = max(seen, 0)
        lock.check()
        courier.committed(ended)  # which the board may not have lived to tell
        trained()
        status = "KILLED" if watch.was_asked else "FINISHED"
    except ray.exceptions.RayError as error:
        raise TrainingFailed(
            f"the Ray cluster is gone: {last_line(error)}; the same command goes on"
        ) from None
    except KeyboardInterrupt:
        patience_s = HASTY_DELIVERY_TIMEOUT_S
        raise
    finally:
        delivery = courier.close(status, HASTY_DELIVERY_TIMEOUT_S if watch.signal else patience_s)
    newest = runs.checkpoints(run.location)[-1:]
    return Result(run, ended, newest[0].uri if newest else None, delivery, watch.signal)


def _train(config: Config, troupe: Troupe, watch: Watch) -> int | None:
    """Until training is done, or was asked to stop; returns images_seen, or None if that was before the first step.

    That takes a Ray Train run, or what is left of one, and another one if that one was taken away.
    """
    board = troupe.board

    def is_over(notes: Mapping[str, Any]) -> bool:
        ended, failed = notes.get(boards.ENDED), notes.get(boards.FAILURE) is not None
        return ended is not None and (ended >= config.train.total_images or watch.was_asked or failed)

    while True:
        workers = troupe.workers()
        watch.run(
            # After a signal Ray is not waited for: sent to the whole process group, it has ended Ray's processes too.
            workers,
            lambda notes: (
                watch.is_before_first_step(notes)
                or ((troupe.stays or watch.signal is not None) and is_over(notes))
            ),
        )
        notes, failure = board.read(), workers.error
        if notes.get(boards.FAILURE) is not None:
            raise notes[boards.FAILURE]
        if is_over(notes):
            return notes[boards.ENDED]
        if watch.is_before_first_step(notes):
            return None
        if failure is None and notes.get(boards.ENDED) is None:
            log.warning("the board died when the workers left; they come again, and see whether all is done")
            continue
        if failure is None:  # a node is about to be taken away: the workers left in good order
            if board.preempted() > config.cluster.max_preemptions:
                raise too_many_preemptions(config)
            log.warning(
                "a node is about to be taken away; going on elsewhere, at %s images", notes[boards.ENDED]
            )
        elif not isinstance(failure, ray.exceptions.ActorDiedError):
            raise TrainingFailed(f"training failed: {last_line(failure)} (--verbose shows the whole story)")
        elif board.failed() > config.cluster.max_failures:
            raise TrainingFailed(f"training failed: {last_line(failure)}")
        else:  # Ray Train does not start again a controller that died (2.60); the next round does
            log.warning("Ray Train's controller died; going on from the last checkpoint with another")
        board.note(boards.ENDED, None)
        if not watch.was_asked:
            board.note(boards.STOP, None)


def _images_seen(config: Config, data_set: DataSet, run: Run) -> int:
    """Position of the newest whole checkpoint; -1: there is none.

    Raises:
        UserError: the run was begun with another configuration, or on other data.
    """
    with keeper.newest_intact(run.location, config.run.storage_timeout_s, log.warning) as folder:
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
    """Where everything is, in lines for a person."""
    folder, delivery = result.run.location.uri, result.delivery
    lines = [f"checkpoint  {result.checkpoint}"] if result.checkpoint else []
    samples = result.run.location.child("samples").child("latest.png")
    with contextlib.suppress(OSError):
        if samples.exists():  # the first one is not drawn with the first checkpoint
            lines.append(f"samples     {samples.uri}")
    if delivery is None or (result.signal and not result.checkpoint):
        return lines
    where = without_password(tracking_uri())
    if delivery.undelivered:
        lines.append(
            f"MLflow      {delivery.undelivered} records could not be delivered to {where}; they are kept in "
            f"{folder}/{segments.FOLDER}, and `python jobs/track.py {folder}` delivers them"
        )
    elif not delivery.ended and result.signal:  # track.py tells the ends of finished runs
        lines.append(
            f"MLflow      {where} has not been told that the run stopped; when it goes on, it will be"
        )
    elif not delivery.ended:
        lines.append(
            f"MLflow      {where} has not been told how the run ended; `python jobs/track.py {folder}` does"
        )
    else:
        lines.append(f"MLflow      run {delivery.run_id} in {where}")
    return lines
