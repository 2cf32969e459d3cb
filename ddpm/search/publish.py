"""Publishes results of a search to its folder and to its MLflow run; leaderboard.py computes them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from ddpm.checkpoints import runs
from ddpm.evaluation import compared_run, comparison_page
from ddpm.evaluation.comparison import Cell, Ranking
from ddpm.search import leaderboard, plots
from ddpm.search.evaluator import RANKING
from ddpm.search.event_log import EventLog, Trial
from ddpm.search.leaderboard import Row
from ddpm.search.setup import Setup
from ddpm.storage.locations import Location
from ddpm.tracking import sync
from ddpm.tracking.metrics_buffer import Artifact, Metrics, Tags
from ddpm.tracking.mlflow_client import Lost, tracking_uri, without_password
from ddpm.tracking.mlflow_runs import PARENT_TAG, Address, MlflowRun
from ddpm.tracking.pages import NOTE_TAG, STOPPED
from ddpm.tracking.retry import OutOfTime
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io
from ddpm.utils.tables import estimate

COMPARED = 8
"""Largest number of trials, the first of the leaderboard, on the page that compares them."""
MLFLOW_TIMEOUT_S = 20.0
MAX_NOTE = 8000
"""MLflow's longest tag: the table of more than about a hundred trials is cut off in the description."""
INTERRUPTED_TIMEOUT_S = 3.0
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "running": STOPPED}
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
        shown = without_password(parent.uri)
        warn(f"the search's run is not in MLflow at {shown} yet, and is logged later: {error}")
    return run.run_id


def interrupted(parent: Address) -> None:
    """Set the status of the search's MLflow run to a stopped one's, if MLflow answers."""
    run = MlflowRun(parent, {}, INTERRUPTED_TIMEOUT_S)
    with contextlib.suppress(OutOfTime, Lost):
        run.open(running=True)
        run.end(STOPPED)


def store(setup: Setup, rows: Sequence[Row], remarks: Sequence[str], parent: Address) -> Iterator[str]:
    """Write table, best config and plots to the search's folder and its MLflow run; yields lines that say where."""
    trials, folder, metric = [row.trial for row in rows], setup.folder, setup.arguments.metric
    files = {
        "results.parquet": leaderboard.parquet(rows),
        "results.md": leaderboard.markdown(rows, remarks).encode(),
    }
    config = leaderboard.best_config(rows, setup.arguments.config)
    if config is not None:
        files["best.json"] = config.encode()
        files["parallel.png"] = plots.parallel(trials, setup.space.domains, metric)
    if any(row.by_kid for row in rows):
        files["bits-and-kid.png"] = plots.scatter([row.trial for row in rows if row.by_kid])
    try:
        if page := compared(rows, folder):
            files["comparison.html"] = page
    except (UserError, OSError) as error:
        yield f"comparison  could not be made: {error}"
    for name, data in files.items():
        file = folder.child(name)
        retry_io(partial(file.write, data), where=file.uri, timeout_s=setup.base.run.storage_timeout_s)
    yield f"results     {folder.uri}/results.md, .parquet; plots next to them"
    if "comparison.html" in files:
        yield f"comparison  {folder.uri}/comparison.html"
    if config is not None and (reported := rows[0].reported):
        value = f"{estimate(*reported)} bits/dim on images that ranked nothing"
        yield f"best        {folder.uri}/best.json, of {trials[0].name}: {value}"
    yield _publish(rows, folder, files, parent)


def compared(rows: Sequence[Row], folder: Location) -> bytes | None:
    """The page that compares the best trials, with the ranks of the leaderboard; None: no trial has begun."""
    own = (row for row in rows if row.trial.last and row.trial.repeats is None)
    begun = (row for row in own if folder.child(row.trial.name).child("run.json").exists())
    if not (shown := list(islice(begun, COMPARED))):
        return None
    note = "compared image by image, among all trials"
    if by_trainings := any(row.by_trainings for row in shown):
        note = "means of several trainings, with their spread, among all finalists"
    trials = compared_run.read([folder.child(row.trial.name).uri for row in shown])
    bits, kid, title = dict[str, Cell](), dict[str, Cell](), "KID"
    for run, row in zip(trials, shown, strict=True):
        last, score = row.trial.last, row.trial.score
        if last and row.by_trainings and row.mean:
            bits[run.key] = Cell(*row.mean, last.images_seen, row.by_trainings)
        elif last and row.by_bits and row.bits is not None and not by_trainings:
            of_image = row.bits[0, RANKING].tolist()
            value = last.bits_per_dim, last.bits_per_dim_error
            bits[run.key] = Cell(*value, last.images_seen, row.by_bits, len(of_image), of_image)
        if last and score and row.by_kid:
            kid[run.key] = Cell(score.value, score.error, last.images_seen, row.by_kid)
            title = score.name
    rankings = [
        Ranking("bits/dim", bits, note),
        Ranking(title, kid, f"{leaderboard.SAMPLER}, {leaderboard.STEPS} steps, among all finalists"),
    ]
    return comparison_page.render(trials, [ranking for ranking in rankings if ranking.cells])


def _publish(rows: Sequence[Row], folder: Location, files: Mapping[str, bytes], parent: Address) -> str:
    """Deliver the results and what is left of the trials' records to MLflow; returns a line that says so."""
    shown = without_password(parent.uri)
    run = MlflowRun(parent, {}, MLFLOW_TIMEOUT_S)
    try:
        run.open(running=True)
        records: list[Any] = [Artifact(name, data) for name, data in files.items()]
        records.append(Tags({NOTE_TAG: files["results.md"].decode()[:MAX_NOTE]}))
        if rows and (reported := rows[0].reported):
            value, error = reported
            values = {"best/bits_per_dim": value, "best_error/bits_per_dim": error}
            records.append(Metrics(values, len(rows), int(time.time() * 1000)))
        whole = run.add(records)
        for row in rows:
            whole &= _deliver_trial(row.trial, folder, parent, str(run.run_id))
        whole &= run.end("FINISHED")
    except OutOfTime as error:
        return f"MLflow      {shown} cannot be reached; run the same command to try again: {error}"
    except Lost as error:
        return f"MLflow      {shown} refuses the search's run: {error}"
    return f"MLflow      run {run.run_id} in {shown}{'' if whole else ', which did not accept everything'}"


def _deliver_trial(trial: Trial, folder: Location, parent: Address, parent_run_id: str) -> bool:
    """Deliver a trial's remaining records and status to MLflow; returns whether MLflow took them."""
    uri = folder.child(trial.name).uri
    try:
        key = runs.existing_run(uri).key
    except UserError:  # the trial never began
        return True
    try:
        rest = sync.remaining(uri, parent.experiment)
        if rest.records:
            sync.deliver(rest, MLFLOW_TIMEOUT_S, lambda done: None)
    except UserError:  # MLflow does not take it now
        return False
    run = MlflowRun(Address(parent.uri, parent.experiment, trial.name, key), {}, MLFLOW_TIMEOUT_S)
    if not run.find():
        return True
    # Its own process may have been killed, or have trained to the end before it was told to stop.
    return run.add([Tags({PARENT_TAG: parent_run_id})]) and run.end(STATUS[trial.status])
