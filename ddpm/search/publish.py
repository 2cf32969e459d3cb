"""The results of a search, made from its folder: files there, and the search with all its trials in MLflow.

leaderboard.py and results.py compute them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ddpm.evaluation import compared_run, comparison_page
from ddpm.evaluation.comparison import Cell, Ranking
from ddpm.evaluation.rung import RANKING
from ddpm.runs import run_folder
from ddpm.runs.curves import CurveRow
from ddpm.runs.run_folder import RunFolder, RunStatus
from ddpm.runs.storage import Location
from ddpm.search import leaderboard, plots, results
from ddpm.search.leaderboard import Row
from ddpm.search.space import domains_from_json
from ddpm.search.trials import Trial, Trials, trial_config
from ddpm.tracking import mlflow_run, run_params
from ddpm.tracking.mlflow_client import Connection, MlflowError, tracking_uri, without_password
from ddpm.tracking.mlflow_pages import NOTE_TAG
from ddpm.tracking.push import Pushed
from ddpm.tracking.pusher import Delivery, Pusher
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io
from ddpm.utils.tables import estimate

COMPARED = 8
"""Largest number of trials, the first of the leaderboard, on the page that compares them."""
MAX_NOTE = 8000
"""MLflow's longest tag: the table of more than about a hundred trials is cut off in the description."""
TABLE = "results.md"
FILES = (TABLE, "results.parquet", "best.json", "parallel.png", "bits-and-kid.png", "comparison.html")
"""Files of a search's folder with its results; some may be missing."""


class SearchRun:
    """The search's own run in MLflow, under which its trials are shown.

    Attributes:
        trials: of the search.
        name: of the search.
        status: what the next push sends.
        rows: the leaderboard; the next push sends the results. None: there are no results yet.
    """

    def __init__(self, trials: Trials) -> None:
        self.name = Path(trials.folder.path).name
        self.status = RunStatus.RUNNING
        self.rows: Sequence[Row] | None = None
        self.trials = trials
        self._time_ms = int(time.time() * 1000)

    def push(self, *, accepted: Callable[[], object], warn: Callable[[str], object]) -> Pushed:
        """Send what the folder has; the run is created if there is none."""
        trials = self.trials
        uri = tracking_uri()
        mlflow = Connection(uri, accepted)
        experiment = trials.config.run.experiment
        key = trials.file.search_key
        run = mlflow_run.open_run(mlflow, experiment, key, self.name, source="ddpm search", warn=warn)
        run.log_params(params(trials))
        points = []
        if self.rows is not None:
            for name in FILES:
                with suppress(FileNotFoundError):
                    run.log_file(name, trials.folder.child(name).read())
            note = trials.folder.child(TABLE).read().decode()
            run.set_tags({NOTE_TAG: note[:MAX_NOTE]})
            reported = self.rows[0].reported if self.rows else None
            if reported is not None:
                at = len(self.rows)
                points.append(CurveRow("best/bits_per_dim", at, reported.value, self._time_ms))
                points.append(CurveRow("best_error/bits_per_dim", at, reported.error, self._time_ms))
        run.log_metrics(points)
        run.set_status(self.status, None if self.status == RunStatus.RUNNING else int(time.time() * 1000))
        return Pushed(without_password(uri), run.experiment_id, run.run_id, len(points))


def runs(trials: Trials) -> Iterator[tuple[Trial, RunFolder]]:
    """The trials with their runs, without those whose driver was killed before it created the run."""
    for trial in trials.all():
        location = trials.folder.child(trial.name)
        card = run_folder.find_card(location)
        if card is not None:
            yield trial, RunFolder(trial.name, location, card.run_key)


def params(trials: Trials) -> dict[str, Any]:
    """The params of a search in MLflow: the config that trials change, and the settings."""
    settings = trials.file.settings
    config = trial_config(trials.config, settings["rungs"], trials.folder)
    own = {f"search.{key}": value for key, value in settings.items() if key not in ("config", "space")}
    space = {f"space.{key}": value for key, value in settings["space"].items()}
    return {**run_params.params(config), **own, **space}


def send(search_run: SearchRun, rows: Sequence[Row], pusher: Pusher, patience_s: float) -> Delivery | None:
    """Push the search with its results and all its trials; None: it is not tracked.

    Args:
        pusher: it pushes `search_run` first.
        patience_s: how long MLflow may accept nothing.
    """
    search_run.rows = rows
    search_run.status = status(search_run.trials)
    for _, run in runs(search_run.trials):
        pusher.add_run(run)
    return pusher.close(patience_s)


def sync(folder: Location, timeout_s: float) -> Iterator[str]:
    """Write the results so far of the search in a folder, and send them to MLflow; yields lines for the user.

    Raises:
        MlflowError: MLflow lacks a part.
    """
    trials = Trials(folder)
    search_run = SearchRun(trials)
    pusher = Pusher()
    pusher.add(search_run.name, search_run.push)
    rows = leaderboard.ranked(trials)
    yield from write(trials, rows)
    delivery = send(search_run, rows, pusher, timeout_s)
    where = without_password(tracking_uri())
    if delivery is None or delivery.pushed is None or not delivery.is_complete:
        reason = delivery.error if delivery and delivery.error else f"no answer for {timeout_s:g} s"
        raise MlflowError(
            f"MLflow at {where} lacks a part of {search_run.name}, whose folder keeps everything: {reason}"
        )
    yield f"sent        {len(trials.all())} trials"
    yield f"MLflow      run {delivery.pushed.run_id} in {where}"


def write(trials: Trials, rows: Sequence[Row]) -> Iterator[str]:
    """Write table, best config, plots and comparison to the search's folder; yields lines that say where."""
    shown = [row.trial for row in rows]
    folder = trials.folder
    remarks = list(results.remarks(rows))
    files = {
        "results.parquet": results.parquet(rows),
        TABLE: results.markdown(rows, remarks).encode(),
    }
    best = results.best_config(rows, trials.config)
    if best is not None:
        files["best.json"] = best.encode()
        files["parallel.png"] = plots.parallel(shown, domains_from_json(trials.file.settings["space"]))
    if any(row.by_kid for row in rows):
        files["bits-and-kid.png"] = plots.scatter([row.trial for row in rows if row.by_kid])
    try:
        page = comparison(rows, folder)
        if page is not None:
            files["comparison.html"] = page
    except (UserError, OSError) as error:
        yield f"comparison  could not be made: {error}"
    for name, data in files.items():
        file = folder.child(name)
        retry_io(partial(file.write, data), where=file.uri, timeout_s=trials.config.run.storage_timeout_s)
    yield f"results     {folder.uri}/{TABLE}, .parquet; plots next to them"
    if "comparison.html" in files:
        yield f"comparison  {folder.uri}/comparison.html"
    reported = rows[0].reported if rows else None
    if best is not None and reported is not None:
        value = f"{estimate(*reported)} bits/dim on the reporting split"
        yield f"best        {folder.uri}/best.json, of {shown[0].name}: {value}"


def status(trials: Trials) -> RunStatus:
    """The status of a search: RUNNING also after its driver was killed."""
    unfinished = [trial for trial in trials.all() if not trial.has_ended]
    if not unfinished:
        return RunStatus.FINISHED
    found = [run_folder.read_status(trials.folder.child(trial.name)) for trial in unfinished]
    is_running = any(of_run is not None and of_run.status == RunStatus.RUNNING for of_run in found)
    return RunStatus.RUNNING if is_running else RunStatus.STOPPED


def comparison(rows: Sequence[Row], folder: Location) -> bytes | None:
    """The page that compares the best trials, with the ranks of the leaderboard; None: no trial has begun."""
    shown = list[Row]()
    for row in rows:
        is_own = row.trial.last is not None and row.trial.repeats is None
        if (
            is_own
            and len(shown) < COMPARED
            and run_folder.find_card(folder.child(row.trial.name)) is not None
        ):
            shown.append(row)
    if not shown:
        return None
    by_trainings = any(row.by_trainings for row in shown)
    note = "compared image by image, among all trials"
    if by_trainings:
        note = "means of several trainings, with their spread, among all finalists"
    trials = compared_run.read([folder.child(row.trial.name).uri for row in shown])
    bits = dict[str, Cell]()
    kid = dict[str, Cell]()
    title = "KID"
    for run, row in zip(trials, shown, strict=True):
        last = row.trial.last
        score = row.trial.score
        if last and row.by_trainings and row.mean:
            mean = row.mean
            bits[run.key] = Cell(mean.value, mean.error, last.images_seen, row.by_trainings)
        elif last and row.by_bits and row.bits is not None and not by_trainings:
            own_bits = last.bits_per_dim
            of_image = row.bits[0, RANKING].tolist()
            bits[run.key] = Cell(
                value=own_bits.value,
                error=own_bits.error,
                images_seen=last.images_seen,
                rank=row.by_bits,
                of_image=of_image,
            )
        if last and score and row.by_kid:
            kid[run.key] = Cell(score.value, score.error, last.images_seen, row.by_kid)
            title = score.name
    rankings = [
        Ranking("bits/dim", bits, note),
        Ranking(
            title, kid, f"{leaderboard.SAMPLER}, {leaderboard.STEPS} steps (T at most), among all finalists"
        ),
    ]
    return comparison_page.render(trials, [ranking for ranking in rankings if ranking.cells])
