"""A whole search: its trials on the Ray cluster, the finalists' images, and the leaderboard."""

import sys
import time

from ddpm.cluster import ray_init, resources
from ddpm.runs.lock import DriverLock
from ddpm.runs.run_folder import Search
from ddpm.search import leaderboard, publish, results
from ddpm.search.config import Arguments
from ddpm.search.publisher import Parent, Publisher, mark_interrupted
from ddpm.search.scoreboard import Scoreboard
from ddpm.search.setup import Setup, prepare
from ddpm.search.study import Study
from ddpm.search.trainables import Spec
from ddpm.search.trials import Trials, read_search
from ddpm.search.tune_callbacks import Interruption
from ddpm.utils.errors import UserError


def search(arguments: Arguments) -> int:
    """Run or continue a search, and print its leaderboard.

    Returns:
        The exit code: 0 with a ranked trial, 1 without one, 128 + the signal that interrupted the search.
    """
    setup = prepare(arguments)
    # A folder of other settings, or of another version, is refused before a cluster is joined.
    read_search(setup.folder, setup.settings, setup.base.run.storage_timeout_s)
    with DriverLock(setup.folder, "search", "--name", print) as lock:
        return _search(setup, lock)


def _search(setup: Setup, lock: DriverLock) -> int:
    began = time.monotonic()
    arguments = setup.arguments
    ray_init.connect(arguments.verbose)
    config, reserved = resources.of_trials(setup.base, arguments.max_concurrent)
    resources.check_storage(config)
    # This binds the name to its settings, so wrong flags must be found before.
    trials = Trials(setup.folder, setup.settings, config.run.storage_timeout_s)
    scoreboard = Scoreboard(trials.all, arguments.num_trials)
    is_tracked = config.run.tracking == "mlflow"
    parent = Parent(Search(setup.name, trials.key), config.run.experiment, is_tracked)
    spec = Spec(
        config=config,
        preset=arguments.preset,
        base=arguments.base or setup.base,
        rungs=setup.rungs,
        search=parent.search,
        verbose=arguments.verbose,
    )
    publisher = Publisher(parent, trials, setup.params, scoreboard.news)
    with Interruption(lambda: lock.is_lost) as interruption:
        study = Study(
            arguments=arguments,
            space=setup.space,
            spec=spec,
            trials=trials,
            publisher=publisher,
            reserved=reserved,
            has_groups=len(config.cluster.world_sizes()) > 1 or config.cluster.world_sizes()[0] > 1,
            interruption=interruption,
            news=scoreboard.news,
            tick=scoreboard.tick,
        )
        with scoreboard.display:
            study.run()
    lock.check()
    if interruption.signal is not None:
        publisher.close(0)
        mark_interrupted(parent, trials)
        print(
            f"interrupted; run the same command again with --name {setup.name} to continue", file=sys.stderr
        )
        return 128 + interruption.signal
    publisher.close(publish.MLFLOW_TIMEOUT_S)
    return _report(setup, parent, trials, began)


def _report(setup: Setup, parent: Parent, trials: Trials, began: float) -> int:
    """Print and store the results of a search whose trials have ended; returns the exit code."""
    try:
        leaderboard.score_finalists(setup, trials)
    except UserError as error:  # such as too few held-out images, or a feature net that is not installed
        print(f"warning: there is no KID of the finalists: {error}", file=sys.stderr)
    rows = leaderboard.ranked(setup, trials)
    results.table(rows).show()
    remarks = list(results.remarks(rows))
    print("\n".join(remarks))
    print(f"searched    {len(rows)} trials, {time.monotonic() - began:.0f} s")
    for line in publish.store(setup, rows, remarks, parent, trials):
        print(line)
    return 0 if any(row.by_bits for row in rows) else 1
