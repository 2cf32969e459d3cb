"""Search noise schedule and learning rate: python tune/search.py PRESET [--num-trials 16] [--max-concurrent 2] ...

Each trial is a run of its own, in the folder STORAGE/NAME. Trials are compared by the whole variational bound of
held-out images in bits/dim, with the same images and noise for all, never by a loss; the best few also by KID of
generated images. The same command again, with the same --name, continues the search. `python tune/search.py PRESET
--help` lists every flag; those of the preset hold for every trial.
"""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ddpm import cli, presets
from ddpm.config import Config, FeatureNetName

if TYPE_CHECKING:
    from setup import Setup

    from ddpm.storage.driver_lock import DriverLock


@dataclass(frozen=True)
class Arguments:
    """A preset, its changes for all trials, and how to search."""

    preset: tyro.conf.Suppress[str]
    config: Annotated[Config, tyro.conf.arg(name="")]
    num_trials: int = 16
    """Total number of trials."""
    max_concurrent: int = 2
    """Trials at a time, each with cluster.num_workers workers."""
    space: tuple[str, ...] = ()
    """Search space, such as 'optim.lr=log(1e-5,1e-2)' 'schedule.kind=linear|cosine'; tune/space.py lists the forms
    and the default."""
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    grid_points: int = 3
    """grid: number of values per range."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha: at each rung, the best 1 / reduction_factor of the trials seen there continue."""
    reduction_factor: int = 3
    """asha: factor between two rungs, in trials that continue and in images seen."""
    num_rungs: int = 3
    """asha: evaluations per trial, the last at its end, each one before it a reduction_factor earlier."""
    metric: Literal["bits_per_dim", "held_out/loss", "train/loss"] = "bits_per_dim"
    """The losses can compare learning rates, but not schedules."""
    variance: Literal["auto", "beta", "beta_tilde", "measured"] = "auto"
    """bits/dim: variance of p(x_{t-1} | x_t). auto: learned if the net learns it, else measured on training images. The
    fixed ones favour schedules of many steps."""
    num_images: int = 512
    """Largest number of held-out images for evaluating trials."""
    seed: int = 0
    """Seed of the searcher and of the evaluator's noise; train.seed is the seed of every trial."""
    finalists: int = 3
    """Number of best trials that are also compared by KID."""
    drawn_images: int = 1000
    """Generated images per finalist."""
    features: FeatureNetName | None = None
    """Feature net of KID. None: classifier if the data has classes, else lite0."""
    name: str | None = None
    """Name of the search. None: search-PRESET."""
    storage: str | None = None
    """Folder or s3:// URI that holds searches. None: run.storage."""
    file: Annotated[str | None, tyro.conf.arg(name="config", metavar="FILE")] = None
    """JSON file of changes to the preset, such as a search's best.json; flags are applied after it."""
    verbose: bool = False
    """Show Ray's messages."""


def main() -> int:
    defaults = {name: Arguments(name, config) for name, config in cli.starting_points().items()}
    chosen = tyro.cli(tyro.extras.subcommand_type_from_defaults(defaults, presets.ABOUT), description=__doc__)

    from ddpm.data import plan  # after parsing: --help and mistakes answer at once

    plan.check_batches(chosen.config)

    import setup  # seconds: PyTorch, Ray

    from ddpm.storage.driver_lock import DriverLock

    search = setup.settled(chosen)
    with DriverLock(search.place, "search", "--name", print) as lock:
        return _search(chosen, search, lock)


def _search(chosen: Arguments, search: "Setup", lock: "DriverLock") -> int:
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
    # From here on the name has its settings: mistakes that another flag corrects have been found before.
    events = EventLog(search.place, search.settings, search.base.run.storage_timeout_s)
    scoreboard = Scoreboard(events.trials, chosen.num_trials)
    manager = study.manager(chosen, search, events, scoreboard.news)
    parent = publish.address(events, search.name, config.run.experiment)
    parent_run_id = publish.open_parent(parent, search.params, print)
    with study.Interruption(lambda: lock.is_lost) as interruption:
        env, stop = study.environment(parent.uri), interruption.state
        spec = study.Spec(
            config, search.train, search.rungs, search.evaluator, env, parent_run_id, chosen.verbose, stop
        )
        with scoreboard:
            study.run(manager, spec, chosen.max_concurrent, interruption)
    lock.check()
    if interruption.signal is not None:
        publish.interrupted(parent)
        print(f"interrupted; the same command, with --name {search.name}, continues", file=sys.stderr)
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
