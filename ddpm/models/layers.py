"""The layers of the U-Net, small enough to read one by one.

They are those of Ho et al. 2020 (arXiv:2006.11239), Appendix B, in a room of their own so that unet.py shows
how the net is put together and nothing else.

Every image tensor is channels-last in memory: attention then reads an image as a sequence of pixels, and
writes it back, without a copy.

Axes: B batch, C channels, H W pixels, N = H * W pixels as a sequence, D width of an attention head.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ddpm.config import ModelConfig

NORM_EPS = 1e-6


class Block(nn.Module):
    """A residual block, then self-attention if asked for: [B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(self, width_in: int, width_out: int, attention: bool, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(config.norm_groups, width_in, eps=NORM_EPS)
        self.conv_1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm_2 = nn.GroupNorm(config.norm_groups, width_out, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.attention = SelfAttention(width_out, config) if attention else nn.Identity()
        if config.zero_init:
            zero(self.conv_2)

    def forward(self, x: Tensor, shift: Tensor | None) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        if shift is not None:
            h = h + shift
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h))))
        out: Tensor = self.attention(self.shortcut(x) + h)
        return out


class SelfAttention(nn.Module):
    """Every pixel attends to every pixel, and the result is added: [B, C, H, W] -> the same."""

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim or width
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        if config.zero_init:
            zero(self.project)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).mT  # [B, N, C]
        qkv = self.qkv(pixels).unflatten(2, (3, -1, self.head_dim))  # [B, N, 3, heads, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, N, C]
        return x + self.project(h).mT.unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halve the image: [B, C, H, W] -> [B, C, H / 2, W / 2]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Right and below only: TensorFlow's "same" padding for stride 2, with which Ho et al. trained.
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Double the image: [B, C, H, W] -> [B, C, 2 H, 2 W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def sinusoids(t: Tensor, width: int) -> Tensor:
    """t on clocks of `width` / 2 speeds, from 1 down to 1/10000 radian a step: [B] -> float32 [B, width].

    First all sines, then all cosines.

    Source: Vaswani et al. 2017, Section 3.5; the speeds and the order are those of Ho et al.'s code.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def zero(layer: nn.Conv2d | nn.Linear) -> None:
    """Make the layer's output 0: at the start, a residual branch that ends in it adds nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
