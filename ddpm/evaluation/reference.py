"""Features of real images, computed once per data set and feature net.

Axes: M images, F features.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ddpm.data.reading import DataSet, Images
from ddpm.evaluation.cache import Cache
from ddpm.evaluation.features import FeatureNet, Features, features_of

CHUNK_IMAGES = 4096
WINDOW_ROWS = 8192
"""Window size of the fixed order of images, independent of a run's window size."""


def images_of(data_set: DataSet, start: int, stop: int) -> Images:
    """The images at these positions of the fixed order of `real_features`; fewer at the end of the split."""
    stop = min(stop, data_set.rows.num_rows)
    return data_set.read(data_set.plan(0, WINDOW_ROWS), start, stop, "substitute")


def real_features(
    data_set: DataSet,
    net: FeatureNet,
    cache: Cache,
    num_images: int,
    device: torch.device,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Features:
    """The features of the first `num_images` of the split, or of all if it has fewer, in a fixed order.

    Raises:
        UserError: the split cannot be read, or the cache cannot be written.
    """
    num_images = min(num_images, data_set.rows.num_rows)

    def make() -> dict[str, Tensor]:
        plan, parts = data_set.plan(0, WINDOW_ROWS), list[Features]()
        for part in data_set.parts(plan, 0, num_images, CHUNK_IMAGES, "substitute"):
            parts.append(features_of(net, torch.from_numpy(part.image).to(device)))
            on_progress(sum(map(len, parts)))
        return {"values": torch.from_numpy(np.concatenate(parts))}

    name = f"features-{net.name}-{net.digest[:16]}-{num_images}-{data_set.key}"
    return cache.get(name, make)["values"].numpy()
