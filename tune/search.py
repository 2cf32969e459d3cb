"""Search noise schedule and learning rate: python tune/search.py PRESET [--num-trials 16] [--max-concurrent 2] ...

Each trial is a run of its own, in the folder STORAGE/NAME. What compares them is the whole variational bound of
held-out images in bits/dim, the same images and noise for all, and never a loss. The best few are drawn from, and
compared by KID. Typing the same command again, with the same --name, goes on where the search stopped.
`python tune/search.py PRESET --help` lists every flag; those of the preset hold for every trial.
"""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ddpm import cli, presets
from ddpm.config import Config, FeatureNetName

if TYPE_CHECKING:
    from outset import Outset

    from ddpm.storage.driver_lock import DriverLock


@dataclass(frozen=True)
class Arguments:
    """A preset, what is changed in it for all trials, and how to search."""

    preset: tyro.conf.Suppress[str]
    config: Annotated[Config, tyro.conf.arg(name="")]
    num_trials: int = 16
    max_concurrent: int = 2
    """Trials at a time; each has cluster.num_workers workers."""
    space: tuple[str, ...] = ()
    """What is searched, as 'optim.lr=log(1e-5,1e-2)' 'schedule.kind=linear|cosine'; tune/space.py lists the forms,
    and the default."""
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    grid_points: int = 3
    """grid: values of each range."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha: at each rung, the better third of those seen there goes on."""
    reduction_factor: int = 3
    num_rungs: int = 3
    """Trials are judged at their end, and (asha) num_rungs - 1 times before, each a reduction_factor earlier."""
    metric: Literal["bits_per_dim", "held_out/loss", "train/loss"] = "bits_per_dim"
    """The losses compare learning rates, but not schedules."""
    variance: Literal["auto", "beta", "beta_tilde", "measured"] = "auto"
    """bits/dim: the variance of p(x_{t-1} | x_t). auto: learned where the net learns it, else measured on training
    images; the fixed ones favour schedules of many steps."""
    num_images: int = 512
    """Held-out images by which trials are judged, at most."""
    seed: int = 0
    """Of the searcher and of the evaluator's noise; train.seed is that of all trials."""
    finalists: int = 3
    """So many of the best are drawn from, and compared by KID."""
    drawn_images: int = 1000
    features: FeatureNetName | None = None
    """KID's; None: classifier where the data has classes, else lite0."""
    name: str | None = None
    """None: search- and the preset."""
    storage: str | None = None
    """Folder or s3:// URI that holds searches; None: run.storage."""
    file: Annotated[str | None, tyro.conf.arg(name="config", metavar="FILE")] = None
    """JSON of what else is changed in the preset, as a search's best.json; flags come after."""
    verbose: bool = False
    """Show Ray's own messages."""


def main() -> int:
    defaults = {name: Arguments(name, config) for name, config in cli.starting_points().items()}
    chosen = tyro.cli(tyro.extras.subcommand_type_from_defaults(defaults, presets.ABOUT), description=__doc__)

    from ddpm.data import plan  # after parsing: --help and mistakes answer at once

    plan.check_batches(chosen.config)

    import outset  # seconds: PyTorch, Ray

    from ddpm.storage.driver_lock import DriverLock

    search = outset.settled(chosen)
    with DriverLock(search.place, "search", "--name", print) as lock:
        return _search(chosen, search, lock)


def _search(chosen: Arguments, search: "Outset", lock: "DriverLock") -> int:
    import study
    from rich.console import Console
    from scoreboard import Scoreboard

    from ddpm.cluster import ray_init, resources
    from ddpm.search import leaderboard, publish
    from ddpm.search.event_log import EventLog

    began = time.monotonic()
    ray_init.connect(chosen.verbose)
    config = resources.shared(search.base, chosen.max_concurrent)
    resources.check_storage(config)
    # From here on the name has its settings: whatever could be mended by another flag has been checked.
    events = EventLog(search.place, search.settings, search.base.run.storage_timeout_s)
    board = Scoreboard(events.trials, chosen.num_trials)
    manager = study.manager(chosen, search, events, board.news)
    parent = publish.address(events, search.name, config.run.experiment)
    parent_run_id = publish.open_parent(parent, search.params, print)
    with study.Interruption(lambda: lock.is_lost) as interruption:
        env, stop = study.environment(parent.uri), interruption.state
        spec = study.Spec(
            config, search.train, search.rungs, search.evaluator, env, parent_run_id, chosen.verbose, stop
        )
        with board:
            study.run(manager, spec, chosen.max_concurrent, interruption)
    lock.check()
    if interruption.signal is not None:
        publish.interrupted(parent)
        print(f"interrupted; the same command goes on, with --name {search.name}", file=sys.stderr)
        return 128 + interruption.signal
    of_best = search.place, chosen.metric
    leaderboard.draw_finalists(
        events,
        *of_best,
        num_finalists=chosen.finalists,
        num_images=chosen.drawn_images,
        features=chosen.features,
        seed=chosen.seed,
    )
    found = leaderboard.standings(events.trials(), *of_best, search.base)
    Console(width=None if sys.stdout.isatty() else 200).print(leaderboard.table(found))
    for line in leaderboard.remarks(found, chosen.metric):
        print(line)
    print(f"searched    {len(found)} trials, {time.monotonic() - began:.0f} s")
    for line in publish.store(events, *of_best, search.base, search.evaluator.held_out, parent):
        print(line)
    return 0 if any(standing.by_bits for standing in found) else 1


if __name__ == "__main__":
    cli.run(main)
