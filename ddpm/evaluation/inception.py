"""The Inception-v3 that defines FID: TensorFlow's weights of 2015-12-05 in torchvision's layers.

Heusel et al. 2017, arXiv:1706.08500 (FID). The weights are not part of this package: they come from the file that
torch-fidelity and pytorch-fid use, in torch.hub's folder or from a path or URL. Their digest is checked, and nothing in
the file is executed. Unlike in torchvision's net, the average pools of blocks A, C and E1 exclude the padding, E2 has
a max pool, and images are resized as in TensorFlow 1.

Axes: N images, H W, C channels, F = 2,048 features.
"""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception as tv

from ddpm.evaluation.features import rgb
from ddpm.utils.errors import UserError

SHA256_PREFIX = "6726825d"
"""First digits of the weights' SHA-256, as in their file's name."""
FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""File names of torch-fidelity and pytorch-fid in torch.hub's folder."""
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILES[0]}"
SIDE = 299


class Inception:
    """The pooled features before the last layer.

    Args:
        weights: path or http(s):// URL of the file; None: from torch.hub's folder, where torch-fidelity and
            pytorch-fid store it. A URL's file is stored there too.
        sha256_prefix: required first digits of its SHA-256.
    """

    name = "inception"
    size = 2048

    def __init__(self, weights: str | None = None, sha256_prefix: str = SHA256_PREFIX) -> None:
        path = _find(weights, sha256_prefix)
        with path.open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not self.digest.startswith(sha256_prefix):
            raise UserError(
                f"{path} is not the Inception-v3 of FID: its SHA-256 begins with {self.digest[:8]}, "
                f"not with {sha256_prefix}"
            )
        self.net = build_net()
        try:
            self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (RuntimeError, pickle.UnpicklingError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} holds no weights of Inception-v3: {str(error).splitlines()[0]}"
            ) from None
        self.net.fc = nn.Identity()
        self.net.eval().requires_grad_(False)

    def features(self, image: Tensor) -> Tensor:
        level = (rgb(image) + 1) * 127.5
        return self.net.to(image.device)((resize(level.round()) - 128) / 128)


def build_net() -> tv.Inception3:
    """The net, without weights."""
    blocks: list[Any] = [
        tv.BasicConv2d,
        _InceptionA,
        tv.InceptionB,
        _InceptionC,
        tv.InceptionD,
        lambda width: _InceptionE2(width) if width == 2048 else _InceptionE1(width),
        tv.InceptionAux,
    ]
    return tv.Inception3(num_classes=1008, aux_logits=False, inception_blocks=blocks, init_weights=False)


def resize(x: Tensor, side: int = SIDE) -> Tensor:
    """[N, C, H, W] to [N, C, side, side], bilinear as in TensorFlow 1: pixel i is at i H / side, not at its centre."""
    rows, columns = (_interpolation(length, side).to(x) for length in x.shape[2:])
    return rows @ x @ columns.T


def _interpolation(length: int, side: int) -> Tensor:
    """[side, length]: the weights of each new pixel."""
    position = torch.arange(side, dtype=torch.float32) * (length / side)
    left = position.long()
    right = (left + 1).clamp(max=length - 1)
    share = (position - left)[:, None]
    return (1 - share) * F.one_hot(left, length) + share * F.one_hot(right, length)


class _OwnPool:
    """Mixin that replaces the pooling in a block's last branch."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        *others, _ = super()._forward(x)  # type: ignore[misc]
        return [*others, self.branch_pool(self._pool(x))]  # type: ignore[attr-defined]

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _InceptionA(_OwnPool, tv.InceptionA): ...


class _InceptionC(_OwnPool, tv.InceptionC): ...


class _InceptionE1(_OwnPool, tv.InceptionE): ...


class _InceptionE2(_OwnPool, tv.InceptionE):
    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)


def _find(weights: str | None, sha256_prefix: str) -> Path:
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    if weights is None:
        for name in FILES:
            if (hub / name).is_file():
                return hub / name
        raise UserError(
            f"the weights of FID's Inception-v3 are not in {hub}; name a file or a URL, such as {URL}, or use lite0"
        )
    if "://" not in weights:
        if not Path(weights).is_file():
            raise UserError(f"{weights} does not exist; expected the weights of FID's Inception-v3")
        return Path(weights)
    path = hub / FILES[0]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights, str(path), hash_prefix=sha256_prefix, progress=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"cannot download {weights}: {error}") from None
    return path
