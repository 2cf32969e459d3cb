"""Settings of an evaluation, which are flags of ddpm evaluate; light to import, so that --help is fast."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm.config.tree import (
    FeatureNetName,
    NonEmptyStr,
    NonNegativeInt,
    NumImagesOrZero,
    NumScoredImages,
    PositiveInt,
    SampleFlags,
    SamplerName,
    Seed,
)


@dataclass(frozen=True, kw_only=True)
class Settings(SampleFlags):
    """Settings of an evaluation; None is the run's own, unless stated otherwise."""

    num_images: NumScoredImages = 2000
    """Images generated, and the largest number of held-out images."""
    features: FeatureNetName | None = None
    """Feature net for comparing images. None: classifier if the data has classes, else lite0."""
    inception_weights: str | None = None
    """inception: file of its weights. None: the file of torch-fidelity in torch.hub's folder."""
    sampler: SamplerName | None = None
    """Sampler of the compared images."""
    num_sample_steps: PositiveInt | None = None
    """Number of sampling steps. None: those of training; all T if --sampler ddpm takes the place of another one."""
    num_train_images: NumImagesOrZero = 50_000
    """Memorisation: largest number of training images to search for the nearest neighbour. 0: no memorisation."""
    num_draws: NonNegativeInt = 8
    """bits/dim: timesteps per image at which KL_t is measured, by importance sampling. 0: all timesteps."""
    seed: Seed = 0
    """Seed of generated images and of the bound's noise."""
    shards: Annotated[NonEmptyStr | None, tyro.conf.arg(name="data.shards", aliases=["--data"])] = None
    """Folder or s3:// URI of the data set to compare with. None: the training data set."""
    cache: NonEmptyStr | None = None
    """Folder or s3:// URI for features of real images and the classifier. None: evaluation/ next to the shards."""
