"""Feature nets by name."""

from collections.abc import Callable

from ddpm.data.reading import DataSet
from ddpm.evaluation import classifier
from ddpm.evaluation.cache import Cache
from ddpm.evaluation.features import FeatureNet
from ddpm.evaluation.inception import Inception
from ddpm.evaluation.lite0 import Lite0
from ddpm.evaluation.pixels import Pixels
from ddpm.utils.errors import UserError

OnProgress = Callable[[int], None]
FEATURE_NETS: dict[str, Callable[[DataSet, Cache, str | None, OnProgress], FeatureNet]] = {
    "classifier": lambda train, cache, _, on_progress: classifier.build(
        train, cache, on_progress=on_progress
    ),
    "inception": lambda train, cache, weights, _: Inception(weights),
    "lite0": lambda *_: Lite0(),
    "pixels": lambda train, *_: Pixels(train.shape),
}
"""Builders by name; each takes the arguments of `build` after the name."""


def build(
    name: str,
    train: DataSet,
    cache: Cache,
    inception_weights: str | None = None,
    on_progress: OnProgress = lambda done: None,
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
    if name not in FEATURE_NETS:
        raise UserError(f"feature net {name!r} is unknown; it must be one of {', '.join(FEATURE_NETS)}")
    return FEATURE_NETS[name](train, cache, inception_weights, on_progress)
