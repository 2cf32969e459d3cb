"""Features of images: what a feature net is, the features of real images, and the cache of both.

A feature net maps images to vectors, and metrics compare sets of these vectors. A metric depends on its features, so
every score names its feature net. Features are computed from uint8 images, as they are stored; floats are rounded and
clipped first (`images.to_uint8`). What is computed once is cached in a folder or a bucket: features of real images, and
a trained feature net.

Axes: N images, H W height and width, C channels, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ddpm.data.reading import DataSet, LabelledImages
from ddpm.runs.storage import Location
from ddpm.utils import images
from ddpm.utils.digests import digest_of
from ddpm.utils.progress import track
from ddpm.utils.retry import as_user_error

CHECKSUM = "sha256"
"""Name of the tensor in a cache file that holds the digest of the others."""
MAX_CACHE_BYTES = 1 << 32
CHUNK_IMAGES = 4096

Features = NDArray[np.float32]
"""[N, F], one row per image."""


class FeatureNet(Protocol):
    """A feature net; it may be sent to other processes."""

    name: str
    """Name in a score, such as "lite0"."""
    size: int
    """F."""
    digest: str
    """SHA-256 of everything that determines the features: weights and preprocessing."""

    def features(self, image: Tensor) -> Tensor:
        """uint8 [N, H, W, C] to float32 [N, F], on the device of `image`; ValueError for other images."""
        ...


def features_of(net: FeatureNet, image: Tensor, batch_size: int = 256) -> Features:
    """The features of uint8 [N, H, W, C]."""
    with torch.no_grad():
        return torch.cat([net.features(part).cpu().float() for part in image.split(batch_size)]).numpy()


def rgb(image: Tensor) -> Tensor:
    """uint8 [N, H, W, C] to float32 [N, 3, H, W] in [-1, 1]; grey becomes three equal channels."""
    return images.to_model(image).expand(-1, 3, -1, -1)


def normalised(values: Tensor) -> Tensor:
    """Rows of [N, F] scaled to the length sqrt(F), so that KID's kernel sees products of about 1 for any net."""
    return torch.nn.functional.normalize(values.float(), dim=1) * values.shape[1] ** 0.5


@dataclass(frozen=True)
class Cache:
    """A folder of safetensors files; a damaged one is computed again."""

    folder: Location

    def get(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors cached under `name`, which encodes everything they depend on; computed if missing."""
        location = self.folder.child(f"{name}.safetensors")
        with as_user_error(f"cannot read or write the cache file {location.uri}"):
            if (kept := _read(location)) is not None:
                return kept
            tensors = {key: value.detach().cpu().contiguous() for key, value in make().items()}
            location.write(save({**tensors, CHECKSUM: _checksum(tensors)}), durable=True)
        return tensors


def images_of(data_set: DataSet, start: int, stop: int) -> LabelledImages:
    """The images at these positions of the fixed order; fewer at the end of the split."""
    return data_set.fixed_order().read(start, min(stop, data_set.rows.num_rows))


def real_features(
    data_set: DataSet, net: FeatureNet, cache: Cache, num_images: int, device: torch.device
) -> Features:
    """The features of the first `num_images` of the split, or of all if it has fewer, in the fixed order."""
    num_images = min(num_images, data_set.rows.num_rows)

    def compute() -> dict[str, Tensor]:
        parts = data_set.fixed_order().parts(0, num_images, CHUNK_IMAGES)
        tracked = track("features of real images", num_images, parts, lambda part: len(part.image))
        features = [features_of(net, torch.from_numpy(part.image).to(device)) for part in tracked]
        return {"values": torch.from_numpy(np.concatenate(features))}

    name = f"features-{net.name}-{net.digest[:16]}-{num_images}-{data_set.key}"
    return cache.get(name, compute)["values"].numpy()


def real_labels(data_set: DataSet, num_images: int) -> NDArray[np.int64]:
    """The classes of the images of `real_features`."""
    parts = data_set.fixed_order().parts(0, num_images, CHUNK_IMAGES)
    return np.concatenate([part.label for part in parts])


def _read(file: Location) -> dict[str, Tensor] | None:
    """The tensors in a file; None: the file is missing or damaged."""
    try:
        tensors = load(file.read(MAX_CACHE_BYTES))
    except (FileNotFoundError, SafetensorError):
        return None
    checksum = tensors.pop(CHECKSUM, None)
    return tensors if checksum is not None and torch.equal(checksum, _checksum(tensors)) else None


def _checksum(tensors: dict[str, Tensor]) -> Tensor:
    return torch.tensor(list(bytes.fromhex(digest_of(tensors))), dtype=torch.uint8)
