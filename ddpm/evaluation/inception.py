"""The Inception-v3 that defines FID: torch-fidelity's, with TensorFlow's weights of 2015-12-05.

Heusel et al. 2017, arXiv:1706.08500 (FID). The weights are a file that the user names; nothing is downloaded.
torch-fidelity unpickles its weights without restriction, which could execute code. So the file is checked by its
digest and read as tensors alone (weights_only=True), and torch-fidelity gets a copy of these tensors.

Axes: N images, H W, C channels, F = 2,048 features.
"""

import hashlib
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ddpm.utils.errors import UserError

SHA256_PREFIX = "6726825d"
"""First digits of the weights' SHA-256, as in their file's name."""
FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""File names of torch-fidelity and pytorch-fid in torch.hub's folder."""
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILES[0]}"


class Inception:
    """The pooled features before the last layer.

    Args:
        weights: the file; None: the one that torch-fidelity or pytorch-fid stored in torch.hub's folder.
        sha256_prefix: required first digits of its SHA-256.
    """

    name = "inception"
    size = 2048

    def __init__(self, weights: str | None = None, sha256_prefix: str = SHA256_PREFIX) -> None:
        path = _find(weights)
        with path.open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not self.digest.startswith(sha256_prefix):
            raise UserError(
                f"{path} is not the Inception-v3 of FID: its SHA-256 begins with {self.digest[:8]}, "
                f"not with {sha256_prefix}"
            )
        self.net = _load(path)

    def features(self, image: Tensor) -> Tensor:
        pixels = image.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)  # grey becomes three equal channels
        (values,) = self.net.to(image.device)(pixels)
        return values


def _load(path: Path) -> nn.Module:
    """torch-fidelity's net with the weights in a file, which is not executed."""
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ModuleNotFoundError:
        raise UserError(
            "the feature net inception needs a package (the extra `fid`): pip install torch-fidelity"
        ) from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        with TemporaryDirectory() as folder:
            copy = Path(folder, "tensors.pth")
            torch.save(tensors, copy)
            return FeatureExtractorInceptionV3(
                name="inception", features_list=["2048"], feature_extractor_weights_path=str(copy)
            )
    except (RuntimeError, pickle.UnpicklingError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no weights of Inception-v3: {str(error).splitlines()[0]}") from None


def _find(weights: str | None) -> Path:
    """The file of the weights, which exists."""
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f"{weights} does not exist; expected the file of FID's Inception-v3, from {URL}")
        return Path(weights)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"the weights of FID's Inception-v3 are not in {folder}; download {URL} and name the file with "
        "--inception-weights, or use the feature net lite0"
    )
