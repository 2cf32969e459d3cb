"""Inputs of an evaluation: checkpoints, ways of sampling, held-out images, a feature net.

User errors are raised here, before any image is sampled. All checkpoints are read first, since a run that is still
training deletes old ones.
"""

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ddpm.build import build_sampler, resolve_sample
from ddpm.checkpoints import checkpoint
from ddpm.config import Config, FeatureNetName, SampleConfig, SampleVariance
from ddpm.data import builtin
from ddpm.data.manifest import MANIFEST, read_manifest
from ddpm.data.reading import DataSet, scale_of
from ddpm.diffusion import schedules, timesteps
from ddpm.diffusion.objectives import PROCESSES
from ddpm.evaluation import classifier, nets
from ddpm.evaluation.cache import Cache
from ddpm.evaluation.features import FeatureNet, Features
from ddpm.evaluation.memorisation import MAX_TRAIN
from ddpm.evaluation.reference import images_of, real_features
from ddpm.evaluation.scores import LEAST_IMAGES
from ddpm.hub import resolve
from ddpm.storage import locations
from ddpm.utils.errors import UserError
from ddpm.utils.images import Pixels
from ddpm.utils.progress import Display

CACHE = "evaluation"
"""Folder beside the shards that caches features of the data set."""


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation."""

    num_images: int = 2000
    """Images generated in each way, and the largest number of held-out images."""
    features: FeatureNetName | None = None
    """None: classifier if the data set has classes, else lite0."""
    inception_weights: str | None = None
    samplers: tuple[str, ...] = ()
    """Each with each number of steps; empty: the run's own."""
    num_sample_steps: tuple[int, ...] = ()
    sample: Mapping[str, Any] = field(default_factory=dict)
    """Other changes to the run's SampleConfig."""
    variance: SampleVariance = "auto"
    """Variance of p(x_{t-1} | x_t), in the bound and in `ancestral`. auto: the best for the net in the bound
    (measure.bound_variance), and the run's own in sampling."""
    num_train_images: int = MAX_TRAIN
    """Largest number of training images to search for the nearest neighbour; 0: no search."""
    num_draws: int = 8
    """Timesteps per image at which KL_t is measured; 0: all."""
    seed: int = 0
    shards: str | None = None
    """Folder or URI of the data set; None: the training data set."""
    cache: str | None = None
    """Folder or URI of the cache; None: beside the shards."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to evaluate, in memory."""

    uri: str
    net: nn.Module
    config: Config
    position: Mapping[str, Any]
    """Its state.json."""
    weights_sha256: str

    @property
    def run(self) -> str:
        """The name of its run; without a name, its folder."""
        *_, above, name = f"/{self.uri.rstrip('/')}".split("/")
        return self.config.run.name or (above if name.startswith(checkpoint.PREFIX) and above else name)


@dataclass(frozen=True)
class EvalContext:
    """The data that all candidates are compared with."""

    uri: str
    """URI of the data set."""
    train: DataSet
    held_out: DataSet
    feature_net: FeatureNet
    real: Features
    """Features of held-out images."""
    other_real: Features
    """Features of training images, for the floor."""
    num_train: int
    """Training images to search for nearest neighbours; 0: there is no search."""
    train_features: Features | None
    """Features of those images; None: there is no search, or the features are pixels."""

    def train_image(self, position: int) -> Pixels:
        """[H, W, C]: the training image at this position of the order in which features are taken."""
        return images_of(self.train, position, position + 1).image[0]


def read(uris: Sequence[str], every: bool = False) -> list[Candidate]:
    """The checkpoints at `uris`; for a run the newest one, or all with `every`.

    Raises:
        UserError: there is no checkpoint, or one is damaged.
    """
    found = [uri for given in uris for uri in resolve.checkpoints_of(given)[0 if every else -1 :]]
    return [_read(uri) for uri in dict.fromkeys(found)]


def ways_of(config: Config, settings: Settings) -> list[SampleConfig]:
    """The ways of sampling a net of `config`, each with its sampler and its number of steps.

    Raises:
        UserError: one of them does not fit the net.
    """
    found = []
    for sampler in settings.samplers or (config.sample.sampler,):
        for steps in settings.num_sample_steps or (config.sample.num_sample_steps,):
            changes: dict[str, Any] = {"sampler": sampler, "num_sample_steps": steps, "seed": settings.seed}
            if settings.variance != "auto":
                changes["variance"] = settings.variance
            sample = replace(config.sample, **{**settings.sample, **changes})
            T = config.schedule.num_timesteps
            build_sampler(config, sample, x_0_error=torch.ones(T, dtype=torch.float64))
            found.append(resolved(config, sample))
    return list(dict.fromkeys(found))


def resolved(config: Config, sample: SampleConfig) -> SampleConfig:
    """`sample` with its sampler and number of steps filled in."""
    sample = resolve_sample(sample, config.objective)
    if sample.num_sample_steps is not None:
        return sample
    steps = timesteps.FEW
    if PROCESSES[config.objective.process].has_bound:
        steps = len(timesteps.build(sample, schedules.build(config.schedule), config.model.num_dims))
    return replace(sample, num_sample_steps=steps)


def choose(candidates: Sequence[Candidate], settings: Settings) -> EvalContext:
    """Open the data set, and compute or load the features of its images.

    Raises:
        UserError: a setting is out of range, there are no held-out images, or a candidate does not fit the data set.
    """
    if settings.num_images < LEAST_IMAGES:
        raise UserError(f"num_images is {settings.num_images}; it must be at least {LEAST_IMAGES}")
    if settings.num_train_images < 0:
        raise UserError(
            f"num_train_images is {settings.num_train_images}; it must be at least 1, or 0 for no search"
        )
    if settings.num_draws < 0:
        raise UserError(f"num_draws is {settings.num_draws}; it must be at least 1, or 0 for all timesteps")
    train, uri = _data_set(candidates, settings.shards)
    held_out = _held_out(train, uri)
    for candidate in candidates:
        _check_fits(candidate, train, uri)
    place = locations.resolve(settings.cache or f"{uri.rstrip('/')}/{CACHE}")
    cache, name = Cache(place), settings.features
    name = name or ("classifier" if len(train.manifest.class_names) > 1 else "lite0")
    n, m = (min(settings.num_images, split.rows.num_rows) for split in (held_out, train))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as stack:
        bar = functools.cache(
            lambda: stack.enter_context(Display("training a classifier", classifier.TRAIN_IMAGES))
        )
        weights = settings.inception_weights
        net = nets.build(name, train, cache, weights, lambda done: bar().update(done))
    k = min(settings.num_train_images, train.rows.num_rows)
    num_features = k if net.name != "pixels" else 0
    total = n + m + num_features
    with Display("real images", total) as display:
        real = real_features(held_out, net, cache, n, device, display.update)
        other = real_features(train, net, cache, m, device, lambda done: display.update(n + done))
        searched = None
        if num_features:
            searched = real_features(train, net, cache, k, device, lambda done: display.update(n + m + done))
        display.update(total)
    return EvalContext(uri, train, held_out, net, real, other, k, searched)


def _read(uri: str) -> Candidate:
    with resolve.local_checkpoint(uri) as folder:
        net, config = checkpoint.load_net(folder, torch.device("cpu"))
        digest = checkpoint.read_checksums(folder)["ema.safetensors"]
        return Candidate(uri, net, config, checkpoint.read_state(folder), digest)


def _data_set(candidates: Sequence[Candidate], shards: str | None) -> tuple[DataSet, str]:
    """The training split of the data set in `shards`, or else of the candidates' data set; and its URI."""
    config = candidates[0].config
    known, source = config.data.shards, config.data.source
    if shards is None:
        if len({candidate.position.get("data_fingerprint") for candidate in candidates}) > 1:
            raise UserError(
                "the checkpoints were trained on different data; name the data set to evaluate all of them on with "
                "--data.shards"
            )
        if known is not None and locations.resolve(known).child(MANIFEST).exists():
            shards = known
        elif source is None:
            where = f"is no longer at {known}" if known else "is not known"
            raise UserError(f"the data of {candidates[0].uri} {where}; name it with --data.shards")
    config = builtin.with_shards(
        replace(config, data=replace(config.data, shards=shards), run=replace(config.run, storage="runs"))
    )
    uri, timeout_s = str(config.data.shards), config.run.storage_timeout_s
    place = locations.resolve(uri)
    manifest = read_manifest(place, timeout_s)
    scale = scale_of(manifest, config.model.image_size)
    return DataSet(place, manifest, config.data.split, timeout_s, scale), uri


def _held_out(train: DataSet, uri: str) -> DataSet:
    held_out = train.held_out()
    if held_out is None:
        raise UserError(
            f"{uri} has no held-out images: it needs a split named test besides the training split {train.split}; "
            "name a data set that has one with --data.shards"
        )
    if held_out.rows.num_rows < LEAST_IMAGES:
        raise UserError(
            f"{uri} has {held_out.rows.num_rows} held-out images; an evaluation needs at least {LEAST_IMAGES}"
        )
    return held_out


def _check_fits(candidate: Candidate, data_set: DataSet, uri: str) -> None:
    """Raise UserError unless the net's images have the shape and classes of the data set."""
    model, manifest = candidate.config.model, data_set.manifest
    draws = f"{model.image_size}x{model.image_size} in {model.channels} channel(s)"
    holds = "{}x{} in {} channel(s)".format(*data_set.shape)
    if draws != holds:
        raise UserError(
            f"{candidate.uri} makes images of {draws}, but {uri} holds images of {holds}; "
            "name the data it was trained on with --data.shards"
        )
    if model.num_classes not in (0, len(manifest.class_names)):
        raise UserError(
            f"{candidate.uri} has {model.num_classes} classes, but {uri} has {len(manifest.class_names)}; "
            "name the data it was trained on with --data.shards"
        )
