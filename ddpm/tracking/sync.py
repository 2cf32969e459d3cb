"""Delivery of a run's remaining records to MLflow after the run: `jobs/sync.py`, and searches for their trials."""

from collections.abc import Callable
from dataclasses import dataclass

from ddpm.checkpoints import runs
from ddpm.config import Config, RunConfig
from ddpm.config_io import from_json
from ddpm.storage.locations import Location
from ddpm.tracking import run_params, spool
from ddpm.tracking.mlflow_client import Lost, tracking_uri, without_password
from ddpm.tracking.mlflow_runs import Address, MlflowRun
from ddpm.tracking.retry import OutOfTime
from ddpm.tracking.uploader import Deliverer
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error


class NotDelivered(UserError):
    """Records are still in the run's storage."""

    exit_code = 1


@dataclass(frozen=True)
class Remaining:
    """The records of a run that are not delivered yet."""

    address: Address
    config: Config | None
    """The newest checkpoint's; None: there is none."""
    buffer: Location
    committed: int
    """images_seen of that checkpoint; -1: there is none."""
    records: int


def remaining(uri: str, experiment: str = RunConfig.experiment) -> Remaining:
    """The undelivered records of the run in the folder or bucket `uri`.

    Args:
        experiment: MLflow experiment of a run without a checkpoint; otherwise the checkpoint names it.
    """
    run = runs.existing_run(uri)
    config, committed = None, -1
    buffer = run.location.child(spool.FOLDER)
    with as_user_error(f"{run.location.uri} cannot be read"):
        if checkpoints := runs.checkpoints(run.location):
            file = checkpoints[-1].child("config.json")
            config = from_json(file.read().decode(errors="replace"), file.uri)
            committed = int(checkpoints[-1].path.rpartition(runs.PREFIX)[2])
            experiment = config.run.experiment
        records = spool.count(buffer, committed)
    address = Address(tracking_uri(), experiment, run.name, run.key)
    return Remaining(address, config, buffer, committed, records)


def deliver(rest: Remaining, timeout_s: float, show: Callable[[int], None]) -> str | None:
    """Deliver a run's remaining records; the status of its MLflow run is changed only if the run is finished.

    Args:
        timeout_s: seconds without progress after which it gives up.
        show: called with the number of records delivered so far.

    Returns:
        The id of the MLflow run.
    """
    uri, config = without_password(rest.address.uri), rest.config
    run = MlflowRun(rest.address, run_params.params(config) if config else {}, timeout_s)
    try:
        run.open(running=False)
        Deliverer(run, rest.buffer, show).deliver(rest.committed, everything=True)
        if config and rest.committed >= config.train.total_images:
            run.end("FINISHED")
        left = spool.count(rest.buffer, rest.committed)
    except OutOfTime as error:
        why = f"no call succeeded for {timeout_s:g} s; {error}"
        raise NotDelivered(f"MLflow at {uri} cannot be reached, all records are kept: {why}") from None
    except Lost as error:
        raise NotDelivered(f"MLflow at {uri} refuses the run: {error}") from None
    except OSError as error:
        raise NotDelivered(f"{rest.buffer.uri} cannot be read: {error}") from None
    if left:
        raise NotDelivered(
            f"MLflow at {uri} did not accept everything: {left} records are kept in {rest.buffer.uri}"
        )
    return run.run_id
