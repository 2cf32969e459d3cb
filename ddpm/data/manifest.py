"""The description of a data set in one file: manifest.json, written last.

Its fingerprints are recomputed when it is read, so that the data that a run records is the data that it read.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from annotated_types import Ge, Gt, Interval

from ddpm.runs.storage import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

MANIFEST = "manifest.json"
FORMAT: Final = "ddpm-shards/2"
MAX_ROW_GROUP_BYTES = 1 << 31
"""Largest decoded row group, which one task holds in memory; `prepare` writes row groups of about 4 MB."""
MAX_MANIFEST_BYTES = 256 << 20
"""Enough for 2.6 million row groups; reading a manifest takes 5 times as much memory."""
Encoding = Literal["raw", "encoded"]
AtLeastOne = Annotated[int, Ge(1)]
PositiveFloat = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class Shard:
    """One Parquet file."""

    path: str
    """Below the data set's folder: "train/00000.parquet"."""
    num_rows: AtLeastOne
    row_groups: tuple[AtLeastOne, ...]
    """Rows of every row group, in order."""
    num_bytes: AtLeastOne
    sha256: str
    """SHA-256 of the file."""
    row_group_sha256: tuple[str, ...]
    """SHA-256 of the content of every row group, `shards.content_sha256`: checked whenever it is read."""


@dataclass(frozen=True)
class Split:
    """The shards of a split, such as "train", in order."""

    num_rows: AtLeastOne
    fingerprint: str
    """Hash of the image shape, the encoding, the classes, and the shards' row groups and checksums."""
    shards: tuple[Shard, ...]

    @cached_property
    def row_group_ends(self) -> list[int]:
        """Row groups up to the end of each shard."""
        return list(itertools.accumulate(len(shard.row_groups) for shard in self.shards))


@dataclass(frozen=True)
class Latents:
    """What the images of a data set are, if they are the latents of other images (data/encode.py)."""

    pixels: str
    """Folder or URI of the data set that was encoded."""
    pixels_fingerprint: str
    autoencoder: str
    """Its kind: "diffusers"; its configuration and weights are in the folder `autoencoder` beside the shards."""
    digest: str
    """SHA-256 of the autoencoder's configuration and weights."""
    factor: AtLeastOne
    """An image's side divided by a latent's."""
    mean: tuple[float, ...]
    """By channel."""
    std: tuple[PositiveFloat, ...]
    """By channel: the standard deviation."""
    limit: PositiveFloat
    """Latents are clipped to that many standard deviations."""
    clipped_share: float
    """The share of numbers that was clipped."""
    loss_db: float
    """What clipping and rounding to uint8 take from the PSNR of decoded images, in dB."""
    mirrored: bool
    """Whether training images are followed by their mirror images."""

    @property
    def identity(self) -> list[Any]:
        """What the numbers mean, wherever the images and the weights are stored."""
        return [self.pixels_fingerprint, self.digest, self.mean, self.std, self.limit, self.mirrored]


@dataclass(frozen=True)
class _Header:
    format: str


@dataclass(frozen=True)
class Manifest:
    """The description of a data set."""

    source: str
    """Name of its source: "digits"."""
    options: str
    """Hash of everything requested from `prepare`; equal hashes mean equal data."""
    height: AtLeastOne
    width: AtLeastOne
    channels: Annotated[int, Interval(ge=1, le=4096)]
    encoding: Encoding
    class_names: tuple[str, ...]
    """Empty: no labels."""
    splits: dict[str, Split]
    fingerprint: str
    """Hash of all fields."""
    latents: Latents | None = None
    """None: images, of 1 or 3 channels."""
    format: Literal["ddpm-shards/2"] = FORMAT

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the stored images."""
        return self.height, self.width, self.channels


def make_manifest(
    source: str,
    shape: tuple[int, int, int],
    encoding: Encoding,
    class_names: Sequence[str],
    shards: Mapping[str, Sequence[Shard]],
    options: str,
    latents: Latents | None = None,
) -> Manifest:
    """The manifest of shards that have been written, of images [H, W, C]; fingerprints are computed here."""
    height, width, channels = shape
    kind: list[Any] = [height, width, channels, encoding, list(class_names)]
    if latents is not None:
        kind.append(latents.identity)
    splits = {}
    for name, parts in sorted(shards.items()):
        content = [[shard.sha256, shard.row_groups, shard.row_group_sha256] for shard in parts]
        num_rows = sum(shard.num_rows for shard in parts)
        splits[name] = Split(num_rows, _digest([kind, content]), tuple(parts))
    return Manifest(
        source=source,
        options=options,
        height=height,
        width=width,
        channels=channels,
        encoding=encoding,
        class_names=tuple(class_names),
        splits=splits,
        fingerprint=_digest([[name, split.fingerprint] for name, split in splits.items()]),
        latents=latents,
    )


def write_manifest(location: Location, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all; from then on the data set exists."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    location.child(MANIFEST).write(text.encode(), durable=True)


def read_manifest(location: Location, timeout_s: float = 0.0) -> Manifest:
    """The manifest of the data set at `location`, whose storage may fail for `timeout_s`."""
    file = location.child(MANIFEST)
    try:
        text = retry_io(lambda: file.read(MAX_MANIFEST_BYTES), where=file.uri, timeout_s=timeout_s)
    except FileNotFoundError:
        raise UserError(
            f"no data set at {location.uri}: it has no {MANIFEST}; make one with `ddpm prepare SOURCE "
            f"{location.uri}`, or give a folder of images as --data.images"
        ) from None
    return manifest_from_json(text, file.uri)


def manifest_from_json(text: str | bytes, where: str) -> Manifest:
    """The manifest that `text` describes."""
    header = strict_json.parse(_Header, text, where, extra="ignore")
    if header.format != FORMAT:
        raise UserError(
            f"{where}: format is {header.format!r}; this version reads {FORMAT!r}: prepare the data set again, "
            "in another folder or after removing this one"
        )
    manifest = strict_json.parse(Manifest, text, where)
    expected = make_manifest(
        manifest.source,
        shape=manifest.shape,
        encoding=manifest.encoding,
        class_names=manifest.class_names,
        shards={name: split.shards for name, split in manifest.splits.items()},
        options=manifest.options,
        latents=manifest.latents,
    )
    if manifest != expected:
        raise UserError(f"{where}: a fingerprint does not match its shards; the file was altered")
    if manifest.latents is None and manifest.channels > 3:
        raise UserError(f"{where}: channels is {manifest.channels}; images have 1 (grey) or 3 (colour)")
    return manifest


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
