"""TAEF2, the tiny autoencoder of FLUX.2's latents: images [B, 3, H, W] to latents [B, 32, H / 8, W / 8], and back.

Its author, madebyollin, publishes the weights under the MIT licence (github.com/madebyollin/taesd). They are read from
a folder with encoder.safetensors and decoder.safetensors.
"""

from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm.config.kinds import Kind
from ddpm.utils.digests import digest_of
from ddpm.utils.errors import UserError

KIND = Kind("ddpm_taef2:load")
"""What the entry point returns."""

WIDTH = 64
LATENT_CHANNELS = 32
PARTS = ("encoder", "decoder")


def conv(n_in: int, n_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=bias)


class Block(nn.Module):
    """Three convolutions and the input; at the lowest resolution, statistics of the whole image are added before."""

    def __init__(self, n: int, pools: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(n, n), nn.ReLU(), conv(n, n), nn.ReLU(), conv(n, n))
        if pools:
            narrow = nn.Conv2d(4 * n, n, 1, bias=False)
            self.pool = nn.Sequential(
                nn.Conv2d(n, 4 * n, 1, bias=False), nn.GroupNorm(4, 4 * n), nn.ReLU(), narrow
            )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Squash(nn.Module):
    """3 tanh(z / 3), which bounds latents."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


def blocks(number: int, pools: bool = False) -> list[nn.Module]:
    return [Block(WIDTH, pools) for _ in range(number)]


def encoder() -> nn.Sequential:
    def halved(pools: bool = False) -> list[nn.Module]:
        return [conv(WIDTH, WIDTH, stride=2, bias=False), *blocks(3, pools)]

    first = [conv(3, WIDTH), *blocks(1)]
    return nn.Sequential(*first, *halved(), *halved(), *halved(pools=True), conv(WIDTH, LATENT_CHANNELS))


def decoder() -> nn.Sequential:
    def doubled(number: int) -> list[nn.Module]:
        return [nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False), *blocks(number)]

    first = [Squash(), conv(LATENT_CHANNELS, WIDTH), nn.ReLU(), *blocks(3, pools=True)]
    return nn.Sequential(*chain(first, doubled(3), doubled(3), doubled(1)), conv(WIDTH, 3))


class Taef2:
    """TAEF2 in float32; its own images are in [0, 1]."""

    def __init__(self, weights: dict[str, dict[str, Tensor]]) -> None:
        self._nets = {"encoder": encoder(), "decoder": decoder()}
        for name, net in self._nets.items():
            net.load_state_dict(weights[name])
            net.eval().requires_grad_(False)
        self.digest = digest_of(
            {f"{part}.{name}": w for part, of in weights.items() for name, w in of.items()}, "taef2/1"
        )

    def encode(self, x: Tensor) -> Tensor:
        z: Tensor = self._nets["encoder"]((x + 1) / 2)
        return z

    def decode(self, z: Tensor) -> Tensor:
        x: Tensor = self._nets["decoder"](z)
        return 2 * x - 1

    def save(self, folder: Path) -> None:
        for name, net in self._nets.items():
            save_file(
                {key: w.contiguous() for key, w in net.state_dict().items()}, folder / f"{name}.safetensors"
            )

    def to(self, device: torch.device) -> "Taef2":
        for net in self._nets.values():
            net.to(device)
        return self


def load(weights: str) -> Taef2:
    """TAEF2 from the folder `weights`."""
    read = {}
    for name in PARTS:
        file = Path(weights, f"{name}.safetensors")
        try:
            read[name] = {key: w.float() for key, w in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    try:
        return Taef2(read)
    except RuntimeError as error:
        raise UserError(
            f"{weights} has other weights than TAEF2: {' '.join(str(error).split())[:200]}"
        ) from None
