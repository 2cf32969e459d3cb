"""Publishes results of a search to its folder and to its MLflow run; leaderboard.py and results.py compute them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

from ddpm.evaluation import compared_run, comparison_page
from ddpm.evaluation.comparison import Cell, Ranking
from ddpm.evaluation.rung import RANKING
from ddpm.runs import run_folder
from ddpm.runs.curves import CurveRow
from ddpm.runs.storage import Location
from ddpm.search import leaderboard, plots, results
from ddpm.search.leaderboard import Row
from ddpm.search.publisher import Parent, push_trial, record_outcome
from ddpm.search.setup import Setup
from ddpm.search.trials import Trials
from ddpm.tracking.mlflow_client import MlflowError, tracking_uri, without_password
from ddpm.tracking.mlflow_pages import NOTE_TAG
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io
from ddpm.utils.tables import estimate

COMPARED = 8
"""Largest number of trials, the first of the leaderboard, on the page that compares them."""
MLFLOW_TIMEOUT_S = 20.0
MAX_NOTE = 8000
"""MLflow's longest tag: the table of more than about a hundred trials is cut off in the description."""


def store(
    setup: Setup, rows: Sequence[Row], remarks: Sequence[str], parent: Parent, trials: Trials
) -> Iterator[str]:
    """Write table, best config and plots to the search's folder and its MLflow run; yields lines that say where.

    Without tracking nothing is sent.
    """
    shown = [row.trial for row in rows]
    folder = setup.folder
    files = {
        "results.parquet": results.parquet(rows),
        "results.md": results.markdown(rows, remarks).encode(),
    }
    config = results.best_config(rows, setup.arguments.config)
    if config is not None:
        files["best.json"] = config.encode()
        files["parallel.png"] = plots.parallel(shown, setup.space.domains)
    if any(row.by_kid for row in rows):
        files["bits-and-kid.png"] = plots.scatter([row.trial for row in rows if row.by_kid])
    try:
        page = compared(rows, folder)
        if page is not None:
            files["comparison.html"] = page
    except (UserError, OSError) as error:
        yield f"comparison  could not be made: {error}"
    for name, data in files.items():
        file = folder.child(name)
        retry_io(partial(file.write, data), where=file.uri, timeout_s=setup.base.run.storage_timeout_s)
    yield f"results     {folder.uri}/results.md, .parquet; plots next to them"
    if "comparison.html" in files:
        yield f"comparison  {folder.uri}/comparison.html"
    reported = rows[0].reported if rows else None
    if config is not None and reported is not None:
        value = f"{estimate(*reported)} bits/dim on the reporting split"
        yield f"best        {folder.uri}/best.json, of {shown[0].name}: {value}"
    if parent.is_tracked:
        yield _publish(setup, rows, trials, files, parent)
    else:
        for row in rows:
            record_outcome(trials, row.trial.name)


def compared(rows: Sequence[Row], folder: Location) -> bytes | None:
    """The page that compares the best trials, with the ranks of the leaderboard; None: no trial has begun."""
    own = (row for row in rows if row.trial.last and row.trial.repeats is None)
    begun = (row for row in own if folder.child(row.trial.name).child(run_folder.CARD).exists())
    shown = list(islice(begun, COMPARED))
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


def _publish(
    setup: Setup, rows: Sequence[Row], trials: Trials, files: Mapping[str, bytes], parent: Parent
) -> str:
    """Send the results and the trials to MLflow; returns a line with the outcome."""
    where = without_password(tracking_uri())
    try:
        run = parent.open()
        run.log_params(setup.params)  # MLflow may have been unreachable while the search ran
        for name, data in files.items():
            run.log_file(name, data)
        run.set_tags({NOTE_TAG: files["results.md"].decode()[:MAX_NOTE]})
        reported = rows[0].reported if rows else None
        if reported is not None:
            now_ms = int(time.time() * 1000)
            value = CurveRow("best/bits_per_dim", len(rows), reported.value, now_ms)
            error = CurveRow("best_error/bits_per_dim", len(rows), reported.error, now_ms)
            run.log_metrics([value, error])
        for row in rows:
            push_trial(trials, row.trial.name, MLFLOW_TIMEOUT_S)
        run.set_status("FINISHED", int(time.time() * 1000))
    except MlflowError as error:
        return f"MLflow      {where} does not accept the search; run the same command to try again: {error}"
    return f"MLflow      run {run.run_id} in {where}"
