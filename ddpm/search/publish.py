"""Publishes results of a search to its folder and to its MLflow run; leaderboard.py computes them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.build import build_objective
from ddpm.checkpoints import runs
from ddpm.config import Config
from ddpm.data.reading import DataSet
from ddpm.evaluation import compared_run, comparison_page, context, measure
from ddpm.evaluation.comparison import Cell, Ranking
from ddpm.evaluation.reference import images_of
from ddpm.search import leaderboard, plots
from ddpm.search.event_log import EventLog, Metric, Trial
from ddpm.search.leaderboard import Row
from ddpm.storage.locations import Location
from ddpm.tracking import uploader
from ddpm.tracking.metrics_buffer import Artifact, Metrics, Tags
from ddpm.tracking.mlflow_client import Lost, tracking_uri
from ddpm.tracking.mlflow_runs import Address, MlflowRun, without_password
from ddpm.tracking.pages import NOTE_TAG
from ddpm.tracking.retry import OutOfTime
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

LOG_SNR = np.linspace(-8, 8, 33)
CURVE_IMAGES = 128
COMPARED = 8
"""Largest number of trials, the first of the leaderboard, on the page that compares them."""
MLFLOW_TIMEOUT_S = 20.0
MAX_NOTE = 8000
"""MLflow's longest tag: the table of more than about a hundred trials is cut off in the description."""
INTERRUPTED_TIMEOUT_S = 3.0
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "running": "KILLED"}
"""MLflow's status for each status of a trial."""


def address(events: EventLog, name: str, experiment: str) -> Address:
    """The address of the search's run in MLflow."""
    return Address(tracking_uri(), experiment, name, events.key, source="tune/search.py")


def open_parent(parent: Address, params: Mapping[str, Any], warn: Callable[[str], None]) -> str | None:
    """The id of the search's MLflow run, which is created if there is none; None: MLflow is unavailable."""
    run = MlflowRun(parent, params, MLFLOW_TIMEOUT_S)
    try:
        run.open(running=True)
    except (OutOfTime, Lost) as error:
        warn(
            f"the search's run is not in MLflow at {without_password(parent.uri)} yet, and is logged later: "
            f"{error or run.call.trouble}"
        )
    return run.run_id


def interrupted(parent: Address) -> None:
    """Set the status of the search's MLflow run to KILLED, if MLflow answers."""
    run = MlflowRun(parent, {}, INTERRUPTED_TIMEOUT_S)
    with contextlib.suppress(OutOfTime, Lost):
        run.open(running=True)
        run.end("KILLED")


def store(
    events: EventLog, place: Location, metric: Metric, base: Config, held_out: DataSet, parent: Address
) -> Iterator[str]:
    """Write table, best config and plots to the search's folder and its MLflow run; yields lines with the places."""
    trials = events.trials()
    found = leaderboard.ranked(trials, place, metric, base)
    files = {
        "results.parquet": leaderboard.parquet(found),
        "results.md": leaderboard.markdown(found, leaderboard.remarks(found, metric)).encode(),
    }
    config = leaderboard.best_config(found, base)
    if config is not None:
        files["best.json"] = config.encode()
        files["parallel.png"] = plots.parallel(trials, metric)
    if any(s.by_kid for s in found):
        yield "denoising   the finalists at equal noise ..."
        files["bits-and-kid.png"] = plots.scatter(trials)
        files["denoising.png"] = plots.denoising(LOG_SNR, curves(found, place, held_out))
    try:
        if page := compared(found, place):
            files["comparison.html"] = page
    except (UserError, OSError) as error:
        yield f"comparison  could not be made: {error}"
    for name, data in files.items():
        file = place.child(name)
        retry_io(partial(file.write, data), where=file.uri, timeout_s=base.run.storage_timeout_s)
    yield f"results     {place.uri}/results.md, .parquet; plots next to them"
    if "comparison.html" in files:
        yield f"comparison  {place.uri}/comparison.html"
    if config is not None:
        yield f"best        {place.uri}/best.json, of {found[0].trial.name}"
    yield from _publish(trials, found, place, files, parent)


def curves(found: Sequence[Row], place: Location, held_out: DataSet) -> dict[str, NDArray[np.float64]]:
    """The finalists' errors of x_0_hat, [N, L] at LOG_SNR, by legend entry."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = images_of(held_out, 0, CURVE_IMAGES)
    made = {}
    for standing in (s for s in found if s.by_kid):
        (candidate,) = context.read([place.child(standing.trial.name).uri])
        net, config = candidate.net.to(device), candidate.config
        error = measure.denoising_curve(
            net, config, build_objective(config), batch, torch.from_numpy(LOG_SNR), device=device
        )
        kind, steps = config.schedule.kind, config.schedule.num_timesteps
        made[f"{standing.trial.name} {kind}, T = {steps}"] = error.numpy()
    return made


def compared(found: Sequence[Row], place: Location) -> bytes | None:
    """The page that compares the best trials, with the ranks of the leaderboard; None: no trial has begun.

    Raises:
        UserError: a trial's run cannot be read.
    """
    begun = (s for s in found if s.trial.last and place.child(s.trial.name).child("run.json").exists())
    if not (shown := list(islice(begun, COMPARED))):
        return None
    trials = compared_run.read([place.child(standing.trial.name).uri for standing in shown])
    bits, kid, title = dict[str, Cell](), dict[str, Cell](), "KID"
    for run, standing in zip(trials, shown, strict=True):
        last, drawn = standing.trial.last, standing.trial.drawn
        if last and standing.by_bits:
            estimate = last.bits_per_dim, last.bits_per_dim_error
            bits[run.key] = Cell(*estimate, last.images_seen, standing.by_bits)
        if last and standing.by_kid:
            kid[run.key] = Cell(drawn["value"], drawn["error"], last.images_seen, standing.by_kid)
            title = drawn["name"]
    rankings = [
        Ranking("bits/dim", bits, "compared image by image, among all trials"),
        Ranking(title, kid, f"{leaderboard.SAMPLER}, {leaderboard.STEPS} steps, among all finalists"),
    ]
    return comparison_page.render(trials, [ranking for ranking in rankings if ranking.cells])


def _publish(
    trials: Sequence[Trial],
    found: Sequence[Row],
    place: Location,
    files: Mapping[str, bytes],
    parent: Address,
) -> Iterator[str]:
    shown = without_password(parent.uri)
    run = MlflowRun(parent, {}, MLFLOW_TIMEOUT_S)
    try:
        run.open(running=True)
        records: list[Any] = [Artifact(name, data) for name, data in files.items()]
        records.append(Tags({NOTE_TAG: files["results.md"].decode()[:MAX_NOTE]}))
        if found and found[0].by_bits and (last := found[0].trial.last):
            value, error = last.bits_per_dim, last.bits_per_dim_error
            values = {"best/bits_per_dim": value, "best_error/bits_per_dim": error}
            records.append(Metrics(values, len(trials), int(time.time() * 1000)))
        whole = run.add(records)
        for trial in trials:
            whole &= _settle(trial, place, parent, str(run.run_id))
        whole &= run.end("FINISHED")
    except OutOfTime:
        yield f"MLflow      {shown} cannot be reached; run the same command to try again: {run.call.trouble}"
    except Lost as error:
        yield f"MLflow      {shown} refuses the search's run: {error}"
    else:
        yield f"MLflow      run {run.run_id} in {shown}{'' if whole else ', which did not accept everything'}"


def _settle(trial: Trial, place: Location, parent: Address, parent_run_id: str) -> bool:
    """Deliver a trial's remaining records and status to MLflow; returns whether MLflow took them."""
    uri = place.child(trial.name).uri
    try:
        key = runs.existing_run(uri).key
    except UserError:  # the trial never began
        return True
    try:
        kept = uploader.kept(uri, parent.experiment)
        if kept.records:
            uploader.deliver(kept, MLFLOW_TIMEOUT_S, lambda done: None)
    except UserError:  # MLflow does not take it now
        return False
    own = Address(parent.uri, parent.experiment, trial.name, key, parent_run_id)
    run = MlflowRun(own, {}, MLFLOW_TIMEOUT_S)
    return not run.find() or run.settle(STATUS[trial.status])
