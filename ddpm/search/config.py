"""The arguments of a search: a preset, and how its trials are proposed, stopped and compared."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from ddpm.config.presets import PresetArguments
from ddpm.config.tree import (
    FeatureNetName,
    NonEmptyStr,
    NonNegativeInt,
    NumScoredImages,
    PositiveInt,
    Seed,
    UpTo4096,
)


@dataclass(frozen=True)
class Arguments(PresetArguments):
    """A preset, its changes for all trials, and how to search."""

    num_trials: PositiveInt = 16
    """Total number of trials."""
    max_concurrent: PositiveInt = 2
    """Number of concurrent trials, each with cluster.num_workers workers."""
    space: tuple[str, ...] = ()
    """Search space, such as 'optim.lr=log(1e-5,1e-2)' 'schedule.kind=linear|cosine'; space.py lists the forms and
    the default."""
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    """optuna: TPE. grid: every combination; the space then has values a|b|c only."""
    num_rungs: PositiveInt = 3
    """Evaluations per trial. The last is at the trial's end; each earlier one is at 1 / reduction_factor of the next
    one's images, and there ASHA stops bad trials. 1: every trial runs to its end."""
    reduction_factor: Annotated[int, Interval(ge=2, le=10**6)] = 3
    """Factor between two rungs: the best 1 / reduction_factor of the trials seen at a rung continue."""
    num_images: NumScoredImages = 512
    """Largest number of held-out images for evaluating trials: half rank them, the others report the best one."""
    seed: Seed = 0
    """Seed of the searcher and of the evaluator's noise; train.seed is the seed of every trial."""
    finalists: NonNegativeInt = 3
    """Number of best trials that are also compared by KID."""
    finalist_seeds: UpTo4096 = 1
    """Trainings of each finalist, with train.seed and the seeds after it. Above 1, the ranks of finalists by bits/dim
    are ranks of their configurations, and not only of nets; 3 is enough for that."""
    drawn_images: NumScoredImages = 1000
    """Generated images per finalist."""
    features: FeatureNetName | None = None
    """Feature net of KID. None: classifier if the data has classes, else lite0."""
    name: NonEmptyStr | None = None
    """Name of the search. None: search-PRESET."""
    storage: NonEmptyStr | None = None
    """Folder or s3:// URI that holds searches. None: run.storage."""
