"""Sets of latents: the autoencoder beside their shards, and the images that were encoded.

autoencoder/    configuration and weights of the autoencoder, as its kind writes and loads them
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ddpm.build import TrainedNet
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data.manifest import Latents, Manifest, read_manifest
from ddpm.data.reading import DataSet
from ddpm.latents import autoencoder
from ddpm.latents.autoencoder import Autoencoder
from ddpm.latents.scaling import Decoder, Scaling
from ddpm.runs import checkpoint, storage
from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error

FOLDER = "autoencoder"
MAX_WEIGHTS_BYTES = 4 << 30


def scaling_of(latents: Latents) -> Scaling:
    """How the latents of a data set are stored."""
    return Scaling(mean=latents.mean, std=latents.std, limit=latents.limit)


def store(autoencoder: Autoencoder, location: Location) -> None:
    """Write the autoencoder beside the shards at `location`."""
    with tempfile.TemporaryDirectory(prefix="ddpm-autoencoder-") as folder:
        autoencoder.save(Path(folder))
        for file in sorted(Path(folder).iterdir()):
            location.child(FOLDER).child(file.name).write(file.read_bytes(), durable=True)


def load(location: Location, kind: str, digest: str) -> Autoencoder:
    """The autoencoder of that kind and digest beside the shards at `location`."""
    stored = location.child(FOLDER)
    with as_user_error(f"cannot read {stored.uri}"), _as_folder(stored) as folder:
        loaded = autoencoder.load_kind(kind, str(folder))
    if loaded.digest != digest:
        raise UserError(
            f"{stored.uri} holds another autoencoder than the one that encoded the data set; encode it again"
        )
    return loaded


def decoder_of(location: Location, manifest: Manifest) -> Decoder | None:
    """What makes images of what a net generates that was trained on this data set; None: it generates images."""
    if manifest.latents is None:
        return None
    loaded = load(location, manifest.latents.autoencoder, manifest.latents.digest)
    return Decoder(loaded, scaling_of(manifest.latents))


def load_net(folder: Path, *, ema: bool = True) -> TrainedNet:
    """The net of a checkpoint, ready for sampling; if it generates latents, with their decoder."""
    trained = checkpoint.load_net(folder, ema=ema)
    config = trained.config
    if config.data.latents is None:
        return trained
    location = storage.resolve(str(config.data.shards))
    what = f"the net generates latents, whose autoencoder is beside its data set, {location.uri}"
    try:
        manifest = read_manifest(location, config.run.storage_timeout_s)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    if manifest.latents is None or manifest.latents.digest != config.data.latents:
        raise UserError(f"{what}; there is another data set now")
    return replace(trained, decoder=decoder_of(location, manifest))


def pixels_of(data_set: DataSet) -> DataSet:
    """The images of a data set: itself, or those that were encoded, as they were."""
    latents = data_set.manifest.latents
    if latents is None:
        return data_set
    location = storage.resolve(latents.pixels)
    try:
        manifest = read_manifest(location, data_set.timeout_s)
    except UserError as error:
        raise UserError(f"the images of which {data_set.location.uri} holds the latents: {error}") from None
    if manifest.fingerprint != latents.pixels_fingerprint:
        raise UserError(
            f"{location.uri} holds other images than those of which {data_set.location.uri} holds the latents; encode "
            "them again"
        )
    return DataSet(location, manifest, data_set.split, data_set.timeout_s)


def configured(config: Config, manifest: Manifest, where: str) -> Config:
    """`config` for a data set: with what the net must know of its latents.

    Raises:
        UserError: latents do not allow a setting.
    """
    latents = manifest.latents
    if latents is None:
        if config.data.latents is not None:
            raise UserError(f"{where} holds images, and the run is of latents (data.latents)")
        return config
    if config.data.horizontal_flip:
        raise UserError(
            f"{where} holds latents, and a mirrored latent is not the latent of a mirrored image; use --no-data."
            "horizontal-flip, and `ddpm encode --mirror` for mirror images"
        )
    if config.data.augment:
        raise UserError(
            f"{where} holds latents, and turned or scaled latents are not those of turned or scaled images; use "
            "--data.augment 0"
        )
    return override(config, {"data.latents": latents.digest, "data.x_0_max": scaling_of(latents).x_0_max})


@contextmanager
def _as_folder(location: Location) -> Iterator[Path]:
    """A context with the files at `location` as a local folder."""
    if location.is_local:
        if not Path(location.path).is_dir():
            raise UserError(f"{location.uri} is missing: the autoencoder of the data set; encode it again")
        yield Path(location.path)
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-autoencoder-") as folder:
        for name in location.files():
            Path(folder, name).write_bytes(location.child(name).read(MAX_WEIGHTS_BYTES))
        yield Path(folder)
