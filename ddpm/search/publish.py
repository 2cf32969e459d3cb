"""Publishes results of a search to its folder and to its MLflow run; leaderboard.py computes them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from ddpm.checkpoints import curves as run_curves
from ddpm.checkpoints import runs
from ddpm.evaluation import compared_run, comparison_page
from ddpm.evaluation.comparison import Cell, Ranking
from ddpm.search import leaderboard, plots
from ddpm.search.evaluator import RANKING
from ddpm.search.event_log import Trial
from ddpm.search.leaderboard import Row
from ddpm.search.setup import Setup
from ddpm.storage.locations import Location
from ddpm.tracking import mlflow_run
from ddpm.tracking.mlflow_client import Connection, MlflowError, tracking_uri, without_password
from ddpm.tracking.mlflow_run import MlflowRun
from ddpm.tracking.pages import NOTE_TAG, STOPPED
from ddpm.tracking.pusher import push_patiently
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io
from ddpm.utils.tables import estimate

COMPARED = 8
"""Largest number of trials, the first of the leaderboard, on the page that compares them."""
MLFLOW_TIMEOUT_S = 20.0
MAX_NOTE = 8000
"""MLflow's longest tag: the table of more than about a hundred trials is cut off in the description."""
STATUS: dict[str, runs.StatusName] = {
    "finished": "FINISHED",
    "stopped": "PRUNED",
    "failed": "FAILED",
    "running": "STOPPED",
}
"""A run's status for each status of a trial."""


@dataclass(frozen=True)
class Parent:
    """The search's run in MLflow, which its trials are shown under."""

    search: runs.Search
    experiment: str

    def open(self) -> MlflowRun:
        """Find or create it; raises MlflowError."""
        mlflow, search = Connection(tracking_uri()), self.search
        return mlflow_run.open_run(mlflow, self.experiment, search.key, search.name, source="tune/search.py")


def open_parent(parent: Parent, params: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Create the search's MLflow run, if there is none and MLflow is available."""
    try:
        run = parent.open()
        run.log_params(params)
        run.set_status("RUNNING")
    except MlflowError as error:
        shown = without_password(tracking_uri())
        warn(f"the search's run is not in MLflow at {shown} yet, and is logged later: {error}")


def interrupted(parent: Parent) -> None:
    """Set the status of the search's MLflow run to a stopped one's, if MLflow answers."""
    with contextlib.suppress(MlflowError):
        parent.open().set_status(STOPPED)


def store(setup: Setup, rows: Sequence[Row], remarks: Sequence[str], parent: Parent) -> Iterator[str]:
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


def _publish(rows: Sequence[Row], folder: Location, files: Mapping[str, bytes], parent: Parent) -> str:
    """Send the results and the trials to MLflow; returns a line that says so."""
    shown = without_password(tracking_uri())
    try:
        run = parent.open()
        for name, data in files.items():
            run.log_file(name, data)
        run.set_tags({NOTE_TAG: files["results.md"].decode()[:MAX_NOTE]})
        if rows and (reported := rows[0].reported):
            now_ms, (value, error) = int(time.time() * 1000), reported
            values = {"best/bits_per_dim": value, "best_error/bits_per_dim": error}
            run.log_metrics(run_curves.Row(name, len(rows), v, now_ms) for name, v in values.items())
        for row in rows:
            _push_trial(row.trial, folder)
        run.set_status("FINISHED", int(time.time() * 1000))
    except MlflowError as error:
        return f"MLflow      {shown} does not accept the search; run the same command to try again: {error}"
    return f"MLflow      run {run.run_id} in {shown}"


def _push_trial(trial: Trial, folder: Location) -> None:
    """Push a trial's run with its status: its own process may have been killed, or have trained too far."""
    try:
        run = runs.existing_run(folder.child(trial.name).uri)
    except UserError:  # the trial never began
        return
    before = runs.read_status(run.location)
    if before is not None and before.status != STATUS[trial.status]:
        runs.write_status(run.location, replace(before, status=STATUS[trial.status]))
    push_patiently(run, MLFLOW_TIMEOUT_S)
