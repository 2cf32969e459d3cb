"""The setup of a search, which finds the user's mistakes before anything is started."""

from dataclasses import dataclass, replace
from typing import Any

from ddpm.checkpoints import runs
from ddpm.config import Config, flatten, override
from ddpm.data import builtin, ray_dataset
from ddpm.data.reading import DataSet
from ddpm.diffusion.objectives import PROCESSES
from ddpm.search import space as spaces
from ddpm.search.config import Arguments
from ddpm.search.evaluator import Evaluator
from ddpm.search.event_log import rungs
from ddpm.search.space import Space
from ddpm.storage.locations import Location, resolve
from ddpm.training import loop
from ddpm.utils.errors import UserError
from ddpm.utils.seeding import GENERATOR

LOSS_CANNOT_RANK = (
    "--metric {metric} cannot compare noise schedules: on Gaussian data (std 1/2) a perfect predictor has a loss of "
    "0.24 with linear beta_end 0.01, 0.12 with 0.04 and 0.33 with cosine, so the search would find an easy task, not a "
    "good net; use bits_per_dim (the full bound), or vary only the learning rate: --space 'optim.lr=log(1e-4,1e-2)'"
)


@dataclass(frozen=True)
class Setup:
    """The setup of a search, before its first trial or before it continues."""

    name: str
    place: Location
    """The search's folder."""
    base: Config
    """The config that trials change."""
    space: Space
    rungs: list[int]
    train: DataSet
    evaluator: Evaluator
    settings: dict[str, Any]
    """Everything that determines its trials."""

    @property
    def params(self) -> dict[str, Any]:
        """The settings, flat, for MLflow."""
        own = {
            f"search.{key}": value for key, value in self.settings.items() if key not in ("config", "space")
        }
        space = {f"space.{key}": value for key, value in self.settings["space"].items()}
        return {**self.settings["config"], **own, **space}


def settled(chosen: Arguments) -> Setup:
    """The search that the command line describes.

    Raises:
        UserError: it cannot be run.
    """
    config, preset = chosen.config, chosen.preset
    if config.run.name is not None:
        raise UserError("--run.name is set by the search; name the search with --name")
    run = replace(
        config.run, name=chosen.name or f"search-{preset}", storage=chosen.storage or config.run.storage
    )
    config = runs.settled(replace(config, run=run), preset)
    for flag, value, least in (
        ("grid-points", chosen.grid_points, 1),
        ("reduction-factor", chosen.reduction_factor, 2),
        ("num-rungs", chosen.num_rungs, 1),
        ("num-trials", chosen.num_trials, 1),
    ):
        if value < least:
            raise UserError(f"--{flag} is {value}; it must be at least {least}")
    loop.check(config)
    if not PROCESSES[config.objective.process].has_bound:
        raise UserError(
            f"the process {config.objective.process} has no noise schedule and no bits/dim to search by"
        )
    found = spaces.parse(chosen.space, config)
    if chosen.metric != "bits_per_dim" and found.has_schedule:
        raise UserError(LOSS_CANNOT_RANK.format(metric=chosen.metric))
    config = builtin.with_shards(config)
    train = ray_dataset.open_configured(config)
    held_out = train.held_out()
    if held_out is None:
        raise UserError(
            f"{config.data.shards} has no held-out images: trials are evaluated on a split named test, besides "
            f"{train.split}"
        )
    at = rungs(
        config.train.total_images,
        config.train.batch_size,
        chosen.reduction_factor,
        chosen.num_rungs if chosen.scheduler == "asha" else 1,
    )
    place = resolve(config.run.storage).child(str(config.run.name))
    every = at[0] if len(at) > 1 else min(at[0], config.train.checkpoint_every_images)
    schedule = {
        "train.total_images": at[-1],
        "train.checkpoint_every_images": every,
        "train.keep_checkpoints": -(-at[-1] // at[0]),
        "run.storage": place.uri,
    }
    base = override(config, schedule)
    settings = {
        "config": {
            key: value
            for key, value in flatten(base).items()
            if not key.startswith(("run.", "cluster.", "sample."))
        },
        "space": found.as_json(),
        "metric": chosen.metric,
        "searcher": chosen.searcher,
        "grid_points": chosen.grid_points,
        "scheduler": chosen.scheduler,
        "reduction_factor": chosen.reduction_factor,
        "rungs": at,
        "variance": chosen.variance,
        "num_images": chosen.num_images,
        "seed": chosen.seed,
        "generator": GENERATOR,
        "data_fingerprint": train.rows.fingerprint,
    }
    return Setup(
        str(config.run.name),
        place,
        base,
        found,
        at,
        train,
        Evaluator(train, held_out, chosen.num_images, seed=chosen.seed, variance=chosen.variance),
        settings,
    )
