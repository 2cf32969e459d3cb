"""What an evaluation reads: checkpoints, sampling configurations, data sets, features of real images.

User errors are raised here, before any image is sampled. All checkpoints are read first, since a run that is still
training deletes old ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.build import TrainedNet, build_sampler, num_sample_steps, resolve_sample, with_sampler
from ddpm.config.tree import Config, FeatureNetName, SampleConfig, SampleFlags
from ddpm.data import latents, prepare_for_run
from ddpm.data.manifest import MANIFEST, read_manifest
from ddpm.data.reading import DataSet, scale_of
from ddpm.evaluation import nets
from ddpm.evaluation.feature_scores import LEAST_IMAGES
from ddpm.evaluation.features import Cache, FeatureNet, Features, real_features, real_labels
from ddpm.evaluation.settings import Settings
from ddpm.runs import checkpoint, names, storage
from ddpm.runs.evaluations import SETTINGS
from ddpm.tracking import run_params
from ddpm.utils import devices
from ddpm.utils.errors import UserError

MAX_CLASSIFIED = 64
"""Side of the largest images for which a classifier is trained."""
CACHE = "evaluation"
"""Folder beside the shards that caches features of the data set."""


@dataclass(frozen=True)
class Candidate(TrainedNet):
    """A checkpoint to evaluate, in memory."""

    uri: str
    state: Mapping[str, Any]
    """Its state.json."""
    weights_sha256: str

    @property
    def run(self) -> str:
        """The name of its run; without a name, its folder."""
        return self.config.run.name or names.name_of(self.uri)


@dataclass(frozen=True)
class Reference:
    """The real images that all candidates are compared with."""

    train: DataSet
    """What the nets were trained on: images, or their latents."""
    held_out: DataSet
    train_images: DataSet
    """The images themselves."""
    held_out_images: DataSet
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
    checkpoints: list[str] = []
    for uri in uris:
        of_uri = names.checkpoints_of(uri)
        checkpoints += of_uri if every else of_uri[-1:]
    return [_read(uri) for uri in dict.fromkeys(checkpoints)]


def sampling_config(config: Config, settings: Settings) -> SampleConfig:
    """How a net of `config` is sampled."""
    sample = with_sampler(config.sample, settings.sampler, config.objective)
    sample = settings.changed(sample, num_sample_steps=settings.num_sample_steps, seed=settings.seed)
    build_sampler(replace(config, sample=sample))  # checks it
    return resolved(config, sample)


def resolved(config: Config, sample: SampleConfig) -> SampleConfig:
    """`sample` with its sampler and number of steps filled in; settings without effect have their defaults."""
    sample = resolve_sample(sample, config.objective)
    effective = run_params.params(replace(config, sample=sample))
    defaults = vars(SampleConfig(variance="beta_tilde"))
    unused = {name: defaults[name] for name in SETTINGS if f"sample.{name}" not in effective}
    sample = replace(sample, **unused)
    return replace(sample, num_sample_steps=num_sample_steps(sample, config.schedule.num_timesteps))


def check_effect(configs: Iterable[Config], settings: Settings) -> None:
    """Raise UserError if a setting has no effect with any of `configs`."""
    given = (field.name for field in fields(SampleFlags) if getattr(settings, field.name) is not None)
    run_params.check_effect(configs, given, run_params.flag)


def feature_net_name(given: FeatureNetName | None, images: DataSet) -> FeatureNetName:
    """The feature net `given`, or else the one that fits the images: a classifier of small images in classes."""
    if given is not None:
        return given
    is_small = max(images.shape[:2]) <= MAX_CLASSIFIED
    return "classifier" if is_small and len(images.manifest.class_names) > 1 else "lite0"


def prepare_reference(candidates: Sequence[Candidate], settings: Settings) -> Reference:
    """Open the data set, get the feature net, and compute the features of real images.

    Features, and the classifier, are taken from the cache beside the shards, or computed and stored there: training the
    classifier takes minutes.
    """
    train = _data_set(candidates, settings.shards)
    held_out = _held_out(train)
    for split in (train, held_out):
        if split.rows.num_rows < LEAST_IMAGES:
            has = f"{train.location.uri} has {split.rows.num_rows} images in its split {split.split}"
            raise UserError(f"{has}; an evaluation needs at least {LEAST_IMAGES}")
    for candidate in candidates:
        _check_fits(candidate, train)
    train_images = latents.pixels_of(train)
    held_out_images = _held_out(train_images)
    cache = Cache(storage.resolve(settings.cache) if settings.cache else train_images.location.child(CACHE))
    name = feature_net_name(settings.features, train_images)
    feature_net = nets.build(
        name, train_images, cache, settings.inception_weights
    )  # may train the classifier
    num_held_out = min(settings.num_images, held_out_images.rows.num_rows)
    num_other = min(settings.num_images, train_images.rows.num_rows)
    num_train = min(settings.num_train_images, train_images.rows.num_rows)
    num_train_features = 0 if feature_net.name == "pixels" else num_train
    device = devices.default()
    real = real_features(held_out_images, feature_net, cache, num_held_out, device)
    of_train = real_features(train_images, feature_net, cache, max(num_other, num_train_features), device)
    has_classes = any(candidate.config.model.num_classes for candidate in candidates)
    return Reference(
        train=train,
        held_out=held_out,
        train_images=train_images,
        held_out_images=held_out_images,
        feature_net=feature_net,
        real=real,
        other_real=of_train[:num_other],
        num_train=num_train,
        train_features=of_train[:num_train_features] if num_train_features else None,
        label=real_labels(held_out_images, num_held_out) if has_classes else None,
    )


def _read(uri: str) -> Candidate:
    with names.local_checkpoint(uri) as folder:
        trained = latents.load_net(folder)
        return Candidate(
            net=trained.net,
            config=trained.config,
            decoder=trained.decoder,
            uri=uri,
            state=checkpoint.read_state(folder),
            weights_sha256=checkpoint.read_checksums(folder)["ema.safetensors"],
        )


def _data_set(candidates: Sequence[Candidate], shards: str | None) -> DataSet:
    """The training split of the data set in `shards`, or else of the candidates' data set."""
    config = candidates[0].config
    known = config.data.shards
    if shards is None:
        if len({candidate.state.get("data_fingerprint") for candidate in candidates}) > 1:
            raise UserError(
                "the checkpoints were trained on different data; name the data set to evaluate all of them on with "
                "--data"
            )
        if known is not None and storage.resolve(known).child(MANIFEST).exists():
            shards = known
        elif config.data.source is None:
            where = f"is no longer at {known}" if known else "is not known"
            raise UserError(f"the data of {candidates[0].uri} {where}; name it with --data")
    config = prepare_for_run.prepared(
        replace(config, data=replace(config.data, shards=shards), run=replace(config.run, storage="runs"))
    )
    location = storage.resolve(str(config.data.shards))
    timeout_s = config.run.storage_timeout_s
    manifest = read_manifest(location, timeout_s)
    scale = scale_of(manifest, config.model.image_size)
    return DataSet(location, manifest, config.data.split, timeout_s, scale)


def _held_out(train: DataSet) -> DataSet:
    held_out = train.held_out()
    if held_out is None:
        raise UserError(
            f"{train.location.uri} has no held-out images: it needs a split named test besides the training split "
            f"{train.split}; name a data set that has one with --data"
        )
    return held_out


def _check_fits(candidate: Candidate, data_set: DataSet) -> None:
    """Raise UserError unless the net's images have the shape and classes of the data set."""
    model = candidate.config.model
    uri = data_set.location.uri
    remedy = "name the data it was trained on with --data"
    height, width, channels = data_set.shape
    generated = f"{model.image_size}x{model.image_size} in {model.channels} channel(s)"
    real = f"{height}x{width} in {channels} channel(s)"
    if generated != real:
        raise UserError(
            f"{candidate.uri} makes images of {generated}, but {uri} holds images of {real}; {remedy}"
        )
    num_classes = len(data_set.manifest.class_names)
    if model.num_classes not in (0, num_classes):
        raise UserError(
            f"{candidate.uri} has {model.num_classes} classes, but {uri} has {num_classes}; {remedy}"
        )
