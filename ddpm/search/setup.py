"""The setup of a search, which finds the user's mistakes before anything is started."""

import sys
from dataclasses import dataclass, replace

from ddpm.config import kinds
from ddpm.config.json import flatten, keys_that_affect
from ddpm.config.tree import Affects, Config
from ddpm.data import latents, prepare_for_run, ray_stream, sorted_labels
from ddpm.evaluation import inputs
from ddpm.evaluation.feature_scores import MAX_PAIRWISE
from ddpm.evaluation.rung import Evaluator, Rungs
from ddpm.runs import run_folder
from ddpm.runs.storage import Location, resolve
from ddpm.search import space as spaces
from ddpm.search.config import Arguments
from ddpm.search.space import Space
from ddpm.search.trials import SearchFile, rung_positions, trial_config
from ddpm.training import loop
from ddpm.utils.errors import UserError
from ddpm.utils.seeding import GENERATOR


@dataclass(frozen=True)
class Setup:
    """A search, before its first trial or before it continues."""

    arguments: Arguments
    folder: Location
    base: Config
    """The config that trials change."""
    space: Space
    rungs: Rungs
    file: SearchFile
    """search.json, if the search is new."""


def prepare(arguments: Arguments) -> Setup:
    """The search that the command line describes."""
    config = _named(arguments)
    loop.check(config)
    if not kinds.objective(config.objective.process).has_bound:
        raise UserError(f"the process {config.objective.process} has no bits/dim to search by")
    space = spaces.parse(arguments.space or spaces.DEFAULT, config)
    if arguments.searcher == "grid":
        space.check_grid()
    run_folder.check_writable(config)
    config = prepare_for_run.prepared(config)
    train = ray_stream.open_configured(config)
    config = latents.configured(config, train.manifest, train.location.uri)
    if warning := sorted_labels.warning(train, config.data.window_rows):
        print(f"warning: {warning}", file=sys.stderr)
    held_out = train.held_out()
    if held_out is None or held_out.rows.num_rows < 4:  # two rank trials, two report the best
        raise UserError(
            f"{config.data.shards} has fewer than 4 held-out images: trials are evaluated on a split named test, "
            f"besides {train.split}"
        )
    rungs = rung_positions(
        config.train.total_images, config.train.batch_size, arguments.reduction_factor, arguments.num_rungs
    )
    folder = resolve(config.run.storage).child(str(config.run.name))
    base = trial_config(config, rungs, folder)
    compared = keys_that_affect(base, Affects.WEIGHTS | Affects.TASK)
    settings = {
        "config": {key: value for key, value in flatten(base).items() if key in compared},
        "space": space.as_json(),
        "searcher": arguments.searcher,
        "reduction_factor": arguments.reduction_factor,
        "num_images": arguments.num_images,
        "seed": arguments.seed,
        "rungs": rungs,
        "ranking_images": "every second",
        "generator": GENERATOR,
        "data_fingerprint": train.rows.fingerprint,
    }
    kid = f"KID-{inputs.feature_net_name(arguments.features, latents.pixels_of(train))}"
    return Setup(
        arguments=arguments,
        folder=folder,
        base=base,
        space=space,
        rungs=Rungs(tuple(rungs), Evaluator(train, held_out, arguments.num_images, seed=arguments.seed)),
        file=SearchFile.new(settings, config, kid, min(arguments.drawn_images, MAX_PAIRWISE)),
    )


def _named(arguments: Arguments) -> Config:
    """The config of the command line, named after the search."""
    config = arguments.config
    preset = arguments.preset
    if config.run.name is not None:
        raise UserError("--run.name is set by the search; name the search with --name")
    name = arguments.name or f"search-{preset}"
    storage = arguments.storage or config.run.storage
    run = replace(config.run, name=name, storage=storage)
    return run_folder.with_storage(replace(config, run=run))
