"""Inputs of an evaluation: checkpoints, sampling configurations, held-out images, a feature net.

User errors are raised here, before any image is sampled. All checkpoints are read first, since a run that is still
training deletes old ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.build import TrainedNet, build_sampler, resolve_sample
from ddpm.checkpoints import checkpoint
from ddpm.config import Config, FeatureNetName, SampleConfig, SampleFlags
from ddpm.data import builtin
from ddpm.data.manifest import MANIFEST, read_manifest
from ddpm.data.reading import DataSet, scale_of
from ddpm.diffusion import schedules, timesteps
from ddpm.diffusion.objectives import PROCESSES
from ddpm.evaluation import nets
from ddpm.evaluation.bits_per_dim import bound_variance
from ddpm.evaluation.feature_cache import Cache, real_features, real_labels
from ddpm.evaluation.feature_scores import LEAST_IMAGES
from ddpm.evaluation.features import FeatureNet, Features
from ddpm.evaluation.results import SETTINGS
from ddpm.evaluation.settings import Settings
from ddpm.hub import resolve
from ddpm.storage import locations
from ddpm.tracking import run_params
from ddpm.utils import devices
from ddpm.utils.errors import UserError
from ddpm.utils.progress import Display

CACHE = "evaluation"
"""Folder beside the shards that caches features of the data set."""


@dataclass(frozen=True)
class Candidate(TrainedNet):
    """A checkpoint to evaluate, in memory."""

    uri: str
    position: Mapping[str, Any]
    """Its state.json."""
    weights_sha256: str

    @property
    def run(self) -> str:
        """The name of its run; without a name, its folder."""
        *_, above, name = f"/{self.uri.rstrip('/')}".split("/")
        return self.config.run.name or (above if name.startswith(checkpoint.PREFIX) and above else name)


@dataclass(frozen=True)
class Reference:
    """The data that all candidates are compared with."""

    train: DataSet
    held_out: DataSet
    feature_net: FeatureNet
    real: Features
    """Features of held-out images."""
    other_real: Features
    """Features of training images, for the floor."""
    num_train: int
    """Training images to search for nearest neighbours; 0: no search."""
    train_features: Features | None
    """Features of those images; None: no search, or the features are pixels."""
    label: NDArray[np.int64] | None
    """Classes of the held-out images; None: no net has classes."""


def read_checkpoints(uris: Sequence[str], every: bool = False) -> list[Candidate]:
    """The checkpoints at `uris`; for a run the newest one, or all with `every`."""
    checkpoints = [uri for given in uris for uri in resolve.checkpoints_of(given)[0 if every else -1 :]]
    return [_read(uri) for uri in dict.fromkeys(checkpoints)]


def sampling_configs(config: Config, settings: Settings) -> list[SampleConfig]:
    """The sampling configurations of a net of `config`, each with its sampler and its number of steps."""
    bound_variance(config, settings.variance)  # checks it
    own, configs = settings.changed(config.sample, seed=settings.seed), []
    for sampler in settings.sampler or (config.sample.sampler,):
        for steps in settings.num_sample_steps or (config.sample.num_sample_steps,):
            sample = replace(own, sampler=sampler, num_sample_steps=steps)
            is_ddpm = resolve_sample(sample, config.objective).sampler == "ddpm"
            if is_ddpm and settings.variance != "auto" and settings.variance != "measured":
                sample = replace(sample, variance=settings.variance)
            build_sampler(replace(config, sample=sample))
            configs.append(resolved(config, sample))
    return list(dict.fromkeys(configs))


def resolved(config: Config, sample: SampleConfig) -> SampleConfig:
    """`sample` with its sampler and number of steps filled in; settings without effect have their defaults."""
    sample = resolve_sample(sample, config.objective)
    effective = run_params.params(replace(config, sample=sample))
    defaults = vars(SampleConfig(variance="beta_tilde"))
    sample = replace(
        sample, **{name: defaults[name] for name in SETTINGS if f"sample.{name}" not in effective}
    )
    if sample.num_sample_steps is not None:
        return sample
    steps = timesteps.FEW
    if PROCESSES[config.objective.process].uses_time:
        steps = len(timesteps.build(sample, schedules.build(config.schedule), config.model.num_dims))
    return replace(sample, num_sample_steps=steps)


def check_effect(configs: Iterable[Config], settings: Settings) -> None:
    """Raise UserError if a setting has no effect with any of `configs`."""
    given = (field.name for field in fields(SampleFlags) if getattr(settings, field.name) is not None)
    run_params.check_effect(configs, given, run_params.flag)


def feature_net_name(given: FeatureNetName | None, train: DataSet) -> FeatureNetName:
    """The feature net `given`, or else the one that fits the data."""
    return given or ("classifier" if len(train.manifest.class_names) > 1 else "lite0")


def prepare_reference(candidates: Sequence[Candidate], settings: Settings) -> Reference:
    """Open the data set, and compute or load the features of its images."""
    train = _data_set(candidates, settings.shards)
    held_out = _held_out(train)
    for split in (train, held_out):
        if split.rows.num_rows < LEAST_IMAGES:
            has = f"{train.location.uri} has {split.rows.num_rows} images in its split {split.split}"
            raise UserError(f"{has}; an evaluation needs at least {LEAST_IMAGES}")
    for candidate in candidates:
        _check_fits(candidate, train)
    cache = Cache(locations.resolve(settings.cache) if settings.cache else train.location.child(CACHE))
    name = feature_net_name(settings.features, train)
    n, m = (min(settings.num_images, split.rows.num_rows) for split in (held_out, train))
    device = devices.default()
    net = nets.build(name, train, cache, settings.inception_weights)
    k = min(settings.num_train_images, train.rows.num_rows)
    num_features = k if net.name != "pixels" else 0
    most = max(m, num_features)
    with Display("real images", n + most) as display:
        real = real_features(held_out, net, cache, n, device, display.update)
        of_train = real_features(train, net, cache, most, device, lambda done: display.update(n + done))
        display.update(n + most)
    searched = of_train[:num_features] if num_features else None
    has_classes = any(candidate.config.model.num_classes for candidate in candidates)
    label = real_labels(held_out, n) if has_classes else None
    return Reference(train, held_out, net, real, of_train[:m], k, searched, label)


def _read(uri: str) -> Candidate:
    with resolve.local_checkpoint(uri) as folder:
        trained = checkpoint.load_net(folder)
        digest = checkpoint.read_checksums(folder)["ema.safetensors"]
        return Candidate(trained.net, trained.config, uri, checkpoint.read_state(folder), digest)


def _data_set(candidates: Sequence[Candidate], shards: str | None) -> DataSet:
    """The training split of the data set in `shards`, or else of the candidates' data set."""
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
    location, timeout_s = locations.resolve(str(config.data.shards)), config.run.storage_timeout_s
    manifest = read_manifest(location, timeout_s)
    scale = scale_of(manifest, config.model.image_size)
    return DataSet(location, manifest, config.data.split, timeout_s, scale)


def _held_out(train: DataSet) -> DataSet:
    held_out, uri = train.held_out(), train.location.uri
    if held_out is None:
        raise UserError(
            f"{uri} has no held-out images: it needs a split named test besides the training split {train.split}; "
            "name a data set that has one with --data.shards"
        )
    return held_out


def _check_fits(candidate: Candidate, data_set: DataSet) -> None:
    """Raise UserError unless the net's images have the shape and classes of the data set."""
    model, manifest, uri = candidate.config.model, data_set.manifest, data_set.location.uri
    draws = f"{model.image_size}x{model.image_size} in {model.channels} channel(s)"
    holds = "{}x{} in {} channel(s)".format(*data_set.shape)
    remedy, classes = "name the data it was trained on with --data.shards", len(manifest.class_names)
    if draws != holds:
        raise UserError(
            f"{candidate.uri} makes images of {draws}, but {uri} holds images of {holds}; {remedy}"
        )
    if model.num_classes not in (0, classes):
        raise UserError(f"{candidate.uri} has {model.num_classes} classes, but {uri} has {classes}; {remedy}")
