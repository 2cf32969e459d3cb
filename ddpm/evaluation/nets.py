"""Feature nets by name."""

from collections.abc import Callable
from typing import Literal

from ddpm.data.reading import DataSet
from ddpm.evaluation import classifier
from ddpm.evaluation.cache import Cache
from ddpm.evaluation.features import FeatureNet
from ddpm.evaluation.inception import Inception
from ddpm.evaluation.lite0 import Lite0
from ddpm.evaluation.pixels import Pixels
from ddpm.utils.errors import UserError

Name = Literal["inception", "lite0", "classifier", "pixels"]


def build(
    name: Name,
    train: DataSet,
    cache: Cache,
    inception_weights: str | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> FeatureNet:
    """The feature net `name` for images like those of `train`.

    Args:
        name: inception needs its weights, classifier a data set with labels; pixels and lite0 need nothing.
        train: the split to train a classifier on.
        cache: cache of the trained classifier.
        inception_weights: path or URL; None: the file of torch-fidelity.
        on_progress: called with the number of classifier.TRAIN_IMAGES seen, if a classifier is trained.

    Raises:
        UserError: weights, packages or labels are missing.
    """
    match name:
        case "inception":
            return Inception(inception_weights)
        case "lite0":
            return Lite0()
        case "classifier":
            return classifier.build(train, cache, on_progress=on_progress)
        case "pixels":
            return Pixels(train.shape)
    raise UserError(f"feature net {name!r} is unknown; it must be inception, lite0, classifier or pixels")
