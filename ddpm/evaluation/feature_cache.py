"""What is computed once and cached in a folder or a bucket: trained feature nets, and features of real images.

Axes: M images, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ddpm.data.reading import DataSet, Images
from ddpm.evaluation.features import FeatureNet, Features, digest_of, features_of
from ddpm.storage.locations import Location
from ddpm.utils.retry import as_user_error

CHECKSUM = "sha256"
"""Name of the tensor that holds the digest of the others."""
MAX_CACHE_BYTES = 1 << 32
CHUNK_IMAGES = 4096
WINDOW_ROWS = 8192
"""Window size of the fixed order of images, independent of a run's window size."""


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


def images_of(data_set: DataSet, start: int, stop: int) -> Images:
    """The images at these positions of the fixed order of `real_features`; fewer at the end of the split."""
    stop = min(stop, data_set.rows.num_rows)
    return data_set.read(data_set.plan(0, WINDOW_ROWS), start, stop)


def real_features(
    data_set: DataSet,
    net: FeatureNet,
    cache: Cache,
    num_images: int,
    device: torch.device,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Features:
    """The features of the first `num_images` of the split, or of all if it has fewer, in a fixed order."""
    num_images = min(num_images, data_set.rows.num_rows)

    def make() -> dict[str, Tensor]:
        plan, parts = data_set.plan(0, WINDOW_ROWS), list[Features]()
        for part in data_set.parts(plan, 0, num_images, CHUNK_IMAGES):
            parts.append(features_of(net, torch.from_numpy(part.image).to(device)))
            on_progress(sum(map(len, parts)))
        return {"values": torch.from_numpy(np.concatenate(parts))}

    name = f"features-{net.name}-{net.digest[:16]}-{num_images}-{data_set.key}"
    return cache.get(name, make)["values"].numpy()


def real_labels(data_set: DataSet, num_images: int) -> NDArray[np.int64]:
    """The classes of the images of `real_features`."""
    parts = data_set.parts(data_set.plan(0, WINDOW_ROWS), 0, num_images, CHUNK_IMAGES)
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
