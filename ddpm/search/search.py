"""A whole search: its trials on the Ray cluster, the finalists' images, and the leaderboard."""

import os
import sys
import time

from ddpm.checkpoints.runs import Search
from ddpm.cluster import ray_init, resources
from ddpm.evaluation.evaluate import grey_levels
from ddpm.search import leaderboard, publish, study
from ddpm.search.config import Arguments
from ddpm.search.event_log import EventLog
from ddpm.search.runner import Spec
from ddpm.search.scoreboard import Scoreboard
from ddpm.search.setup import Setup, prepare
from ddpm.storage.driver_lock import DriverLock
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.utils.errors import UserError


def search(arguments: Arguments) -> int:
    """Run or continue a search, and print its leaderboard.

    Returns:
        The exit code: 0 with a ranked trial, 1 without one, 128 + the signal that interrupted the search.
    """
    setup = prepare(arguments)
    with DriverLock(setup.folder, "search", "--name", print) as lock:
        return _search(setup, lock)


def _search(setup: Setup, lock: DriverLock) -> int:
    began, arguments = time.monotonic(), setup.arguments
    ray_init.connect(arguments.verbose)
    config = resources.shared(setup.base, arguments.max_concurrent)
    resources.check_storage(config)
    # This binds the name to its settings, so wrong flags must be found before.
    events = EventLog(setup.folder, setup.settings, config.run.storage_timeout_s)
    scoreboard = Scoreboard(events.trials, arguments.num_trials)
    manager = study.manager(setup, events, scoreboard.news)
    parent = publish.Parent(Search(setup.name, events.key), config.run.experiment)
    publish.open_parent(parent, setup.params, print)
    env = {name: os.environ.get(name, value) for name, value in ray_init.SETTINGS.items()}
    with study.Interruption(lambda: lock.is_lost, scoreboard.tick) as interruption:
        spec = Spec(
            config=config,
            rungs=setup.rungs,
            evaluator=setup.evaluator,
            env=env | ray_init.worker_env() | {"MLFLOW_TRACKING_URI": tracking_uri()},
            preset=arguments.preset,
            search=parent.search,
            verbose=arguments.verbose,
            state=interruption.state,
        )
        with scoreboard.display:
            study.run(manager, spec, arguments.max_concurrent, interruption)
    lock.check()
    if interruption.signal is not None:
        publish.interrupted(parent)
        print(
            f"interrupted; run the same command again with --name {setup.name} to continue", file=sys.stderr
        )
        return 128 + interruption.signal
    try:
        leaderboard.score_finalists(setup, events)
    except UserError as error:  # such as too few held-out images, or a feature net that is not installed
        print(f"warning: there is no KID of the finalists: {error}", file=sys.stderr)
    rows = leaderboard.ranked(setup, events)
    leaderboard.table(rows).show()
    evaluator = setup.evaluator
    remarks = [*leaderboard.remarks(rows, grey_levels(evaluator.held_out, evaluator.num_images))]
    print("\n".join(remarks))
    print(f"searched    {len(rows)} trials, {time.monotonic() - began:.0f} s")
    for line in publish.store(setup, rows, remarks, parent):
        print(line)
    return 0 if any(row.by_bits for row in rows) else 1
