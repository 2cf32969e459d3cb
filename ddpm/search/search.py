"""A whole search: its trials on the Ray cluster, the finalists' images, and the leaderboard."""

import sys
import time

from rich.console import Console

from ddpm.cluster import ray_init, resources
from ddpm.search import leaderboard, publish, setup, study
from ddpm.search.config import Arguments
from ddpm.search.event_log import EventLog
from ddpm.search.runner import Spec
from ddpm.search.scoreboard import Scoreboard
from ddpm.search.setup import Setup
from ddpm.storage.driver_lock import DriverLock


def search(chosen: Arguments) -> int:
    """Run or continue a search, and print its leaderboard.

    Returns:
        The exit code: 0 with a ranked trial, 1 without one, 128 + the signal that interrupted the search.

    Raises:
        UserError: the search cannot be run, or another process runs it.
    """
    found = setup.settled(chosen)
    with DriverLock(found.place, "search", "--name", print) as lock:
        return _search(chosen, found, lock)


def _search(chosen: Arguments, search: Setup, lock: DriverLock) -> int:
    began = time.monotonic()
    ray_init.connect(chosen.verbose)
    config = resources.shared(search.base, chosen.max_concurrent)
    resources.check_storage(config)
    # This binds the name to its settings, so wrong flags must be found before.
    events = EventLog(search.place, search.settings, search.base.run.storage_timeout_s)
    scoreboard = Scoreboard(events.trials, chosen.num_trials)
    manager = study.manager(chosen, search, events, scoreboard.news)
    parent = publish.address(events, search.name, config.run.experiment)
    parent_run_id = publish.open_parent(parent, search.params, print)
    with study.Interruption(lambda: lock.is_lost) as interruption:
        env, stop = study.environment(parent.uri), interruption.state
        same = config, search.train, search.rungs, search.evaluator
        spec = Spec(*same, env, parent_run_id, chosen.verbose, stop)
        with scoreboard:
            study.run(manager, spec, chosen.max_concurrent, interruption)
    lock.check()
    if interruption.signal is not None:
        publish.interrupted(parent)
        print(
            f"interrupted; run the same command again with --name {search.name} to continue", file=sys.stderr
        )
        return 128 + interruption.signal
    leaderboard.draw_finalists(events, search.place, chosen)
    place, metric, base = search.place, chosen.metric, search.base
    found = leaderboard.ranked(events.trials(), place, metric, base)
    Console(width=None if sys.stdout.isatty() else 200).print(leaderboard.table(found))
    for line in leaderboard.remarks(found, metric):
        print(line)
    print(f"searched    {len(found)} trials, {time.monotonic() - began:.0f} s")
    for line in publish.store(events, place, metric, base, search.evaluator.held_out, parent):
        print(line)
    return 0 if any(standing.by_bits for standing in found) else 1
