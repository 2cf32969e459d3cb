"""A whole search: its trials on the Ray cluster, the finalists' images, and the leaderboard."""

import sys
import time

from ddpm.cluster import ray_init, resources
from ddpm.runs.lock import DriverLock
from ddpm.runs.run_folder import RunFolder, RunStatus, Search
from ddpm.search import leaderboard, publish, results
from ddpm.search.config import Arguments
from ddpm.search.publish import SearchRun
from ddpm.search.setup import Setup, prepare
from ddpm.search.study import Study
from ddpm.search.trainables import Spec
from ddpm.search.trials import FILE, Trials, begin_search, read_search
from ddpm.search.tune_callbacks import Interruption, Scoreboard
from ddpm.tracking.mlflow_client import tracking_uri, without_password
from ddpm.tracking.pusher import Delivery, NoPusher, Pusher
from ddpm.training.fit import store_status
from ddpm.utils.errors import UserError

MLFLOW_PATIENCE_S = 20.0
"""The end of a search waits for MLflow until it has accepted nothing for so long."""
INTERRUPTED_PATIENCE_S = 3.0


def run_search(arguments: Arguments) -> int:
    """Run or continue a search, and print its leaderboard.

    Returns:
        The exit code: 0 with a ranked trial, 1 without one, 128 + the signal that interrupted the search.
    """
    setup = prepare(arguments)
    # A folder of other settings, or of another version, is refused before a cluster is joined.
    before = read_search(setup.folder, setup.base.run.storage_timeout_s)
    if before is not None:
        before.check_settings(setup.file.settings, setup.folder.child(FILE).uri)
    with DriverLock(setup.folder, "search", "--name", print) as lock:
        return _run_search(setup, lock)


def _run_search(setup: Setup, lock: DriverLock) -> int:
    began = time.monotonic()
    arguments = setup.arguments
    ray_init.connect(arguments.verbose)
    config, reserved = resources.per_trial(setup.base, arguments.max_concurrent)
    resources.check_storage(config)
    # This binds the name to its settings, so wrong flags must be found before.
    trials = begin_search(setup.folder, setup.file, config.run.storage_timeout_s)
    search_run = SearchRun(trials)
    pusher = Pusher() if config.run.tracking == "mlflow" else NoPusher()
    pusher.add(search_run.name, search_run.push)
    scoreboard = Scoreboard(trials.all, arguments.num_trials)
    spec = Spec(
        config=config,
        preset=arguments.preset,
        base=arguments.base or setup.base,
        rungs=setup.rungs,
        search=Search(search_run.name, trials.file.search_key),
        verbose=arguments.verbose,
    )
    with Interruption(lambda: lock.is_lost) as interruption:
        study = Study(
            arguments=arguments,
            space=setup.space,
            spec=spec,
            trials=trials,
            pusher=pusher,
            reserved=reserved,
            has_groups=max(config.cluster.world_sizes()) > 1,
            interruption=interruption,
            scoreboard=scoreboard,
        )
        with scoreboard.display:
            study.run()
    lock.check()
    # The process of a trial may have written since, or may have been killed.
    unfinished = _store_statuses(trials)
    if interruption.signal is not None:
        search_run.status = RunStatus.STOPPED
        pusher.notify(search_run.name)
        for run in unfinished:
            pusher.add_run(run)
        pusher.close(INTERRUPTED_PATIENCE_S, news_only=True)
        print(
            f"interrupted; run the same command again with --name {search_run.name} to continue",
            file=sys.stderr,
        )
        return 128 + interruption.signal
    try:
        leaderboard.score_finalists(arguments, trials)
    except UserError as error:  # such as too few held-out images, or a feature net that is not installed
        print(f"warning: there is no KID of the finalists: {error}", file=sys.stderr)
    rows = leaderboard.ranked(trials)
    results.table(rows).show()
    print("\n".join(results.remarks(rows)))
    print(f"searched    {len(rows)} trials, {time.monotonic() - began:.0f} s")
    for line in publish.write(trials, rows):
        print(line)
    delivery = publish.send(search_run, rows, pusher, MLFLOW_PATIENCE_S)
    if delivery is not None:
        _print_delivery(delivery, trials.folder.uri)
    return 0 if any(row.by_bits for row in rows) else 1


def _print_delivery(delivery: Delivery, folder: str) -> None:
    where = without_password(tracking_uri())
    if delivery.pushed is None:
        print(
            f"MLflow      {where} does not accept the search; run the same command to try again: {delivery.error}"
        )
        return
    print(f"MLflow      run {delivery.pushed.run_id} in {where}")
    if not delivery.is_complete:
        print(f"            it lacks a part; `ddpm sync {folder}` sends it")


def _store_statuses(trials: Trials) -> list[RunFolder]:
    """Write the status of each trial into its run; returns the runs that have not ended."""
    unfinished = []
    for trial, run in publish.runs(trials):
        if trial.has_ended:
            store_status(run, trial.status)
        else:
            store_status(run, RunStatus.STOPPED)
            unfinished.append(run)
    return unfinished
