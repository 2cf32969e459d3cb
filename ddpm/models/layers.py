"""The layers of the U-Net, small enough to read one by one.

They are those of Ho et al. 2020 (arXiv:2006.11239), Appendix B.

Every image tensor is channels-last in memory: attention then reads an image as a sequence of pixels, and
writes it back, without a copy. Two of torch's CPU kernels are slow on that layout (torch 2.13): group
normalisation with gradients, and attention to few pixels. Here a few large products and sums replace them.

Axes: B batch, C channels, H W pixels, N = H * W pixels as a sequence, G groups, D width of an attention head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpm.models.compile import Region
from ddpm.models.dropout import Dropout

if TYPE_CHECKING:
    from ddpm.config.tree import ModelConfig, UNetConfig

NORM_EPS = 1e-6
EMBEDDED_TIMESTEPS = 1000
"""The T that the sinusoids are made for; every other T is rescaled to it."""
MAX_BLOCKS = 64
"""Largest number of blocks per resolution."""
MAX_SIZE = 1 << 20
"""Largest side, width, and number of classes. A larger net fits in no memory, and torch cannot count its weights."""
FEW_PIXELS = 1024
"""Largest N for which attention on a CPU holds all N x N weights in memory."""


class ResidualBlock(nn.Module, Region):
    """A residual block, then self-attention if asked for: [B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(self, width_in: int, width_out: int, attention: bool, config: UNetConfig) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(config.norm_groups, width_in)
        self.conv_1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm_2 = GroupNorm(config.norm_groups, width_out)
        self.dropout = Dropout(config.dropout)
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

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim or width
        self.norm = GroupNorm(config.norm_groups, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        if config.zero_init:
            zero(self.project)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).mT.contiguous()  # [B, N, C]
        qkv = self.qkv(pixels).unflatten(2, (3, -1, self.head_dim))  # [B, N, 3, heads, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D]
        h = attend(q, k, v).transpose(1, 2).flatten(2)  # [B, N, C]
        return x + self.project(h).mT.unflatten(2, x.shape[2:])


class GroupNorm(nn.GroupNorm):
    """Group normalisation: [B, C, H, W] -> the same.

    On a CPU it runs in float32, as under autocast elsewhere. `_Normalise` is faster where gradients are needed; else,
    and in compiled code, torch's own is.

    Source: Wu and He 2018, arXiv:1803.08494.
    """

    def __init__(self, groups: int, width: int) -> None:
        super().__init__(groups, width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)
        pixels = x.flatten(2).mT  # [B, N, C]
        normed: Tensor = _Normalise.apply(pixels, self.weight, self.bias, self.num_groups)
        return normed.mT.unflatten(2, x.shape[2:])


class _Normalise(torch.autograd.Function):
    """Group normalisation of pixels [B, N, C] in the weights' float32, whatever their dtype, and its derivative.

    x_hat = (x - mean) / std, one mean and std for each image and group; y = weight * x_hat + bias. With dy_hat =
    weight * dy the derivative is dx = (dy_hat - mean(dy_hat) - x_hat * mean(dy_hat * x_hat)) / std. Pixels are
    summed first, channel by channel: what is left for the groups is small. Large tensors are changed in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
        exact = x.to(weight.dtype, copy=True)
        mean = _group_mean(exact.mean(1), groups)  # [B, 1, C]
        centred = exact.sub_(mean)
        rstd = (_group_mean(centred.square().mean(1), groups) + NORM_EPS).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return centred.mul_(rstd * weight).add_(bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        x_hat = x.to(weight.dtype, copy=True).sub_(mean).mul_(rstd)
        dy = dy.to(weight.dtype)
        dbias = dy.mean(1)  # [B, C], of the mean pixel, as dweight
        dweight = (dy * x_hat).mean(1)
        offset = -rstd * _group_mean(weight * dbias, ctx.groups)
        slope = -rstd * _group_mean(weight * dweight, ctx.groups)
        dx = x_hat.mul_(slope).add_(offset).addcmul_(dy, rstd * weight)
        N = x.shape[1]
        return dx.to(x.dtype), dweight.sum(0) * N, dbias.sum(0) * N, None


def _group_mean(per_channel: Tensor, groups: int) -> Tensor:
    """The mean over each group, for each of its channels: [B, C] -> [B, 1, C]."""
    grouped = per_channel.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: three of [B, heads, N, D] -> the same. Vaswani et al. 2017, Eq. 1."""
    if q.device.type != "cpu" or q.shape[2] > FEW_PIXELS:
        return F.scaled_dot_product_attention(q, k, v)
    weights = ((q * q.shape[3] ** -0.5) @ k.mT).softmax(dim=3)
    return weights @ v


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
    """Sinusoids of t at `width` / 2 frequencies, from 1 down to 1/10000 radian a step: [B] -> float32 [B, width].

    First all sines, then all cosines.

    Source: Vaswani et al. 2017, Section 3.5; the frequencies and the order are those of Ho et al.'s code.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


Requirement = tuple[str, bool, str]
"""The name of a config's field, whether its value fits the net, and which values would."""


def check_sizes(config: ModelConfig, num_timesteps: int, requirements: Iterable[Requirement]) -> None:
    """Raise ValueError for the first requirement, of every net or of `requirements`, that is not met."""
    classes = f"0 (unconditional) or the number of classes, at most {MAX_SIZE}"
    common: list[Requirement] = [
        ("channels", 1 <= config.channels <= MAX_SIZE, f"at least 1, and at most {MAX_SIZE}"),
        ("num_classes", 0 <= config.num_classes <= MAX_SIZE, classes),
        ("dropout", 0 <= config.dropout < 1, "in [0, 1)"),
    ]
    for name, met, right in itertools.chain(common, requirements):
        if not met:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be {right}")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps is {num_timesteps}; it must be at least 1")


class Conditional(Protocol):
    """A net that may take t, a label, and how its images were augmented."""

    time_conditional: bool
    num_classes: int
    num_conditions: int


def check_conditions(
    net: Conditional, x_t: Tensor, t: Tensor | None, label: Tensor | None, augmented: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """`label` and `augmented`, or the null label [B] and zeros [B, num_conditions] where a net is given none."""
    if (t is not None) != net.time_conditional:
        right = "a tensor of timesteps" if net.time_conditional else "None"
        raise ValueError(f"t must be {right}: the net has time_conditional {net.time_conditional}")
    if label is not None and not net.num_classes:
        raise ValueError("label must be None: the net has num_classes 0")
    if label is None and net.num_classes:
        label = torch.full((len(x_t),), net.num_classes, device=x_t.device)
    if augmented is not None and not net.num_conditions:
        raise ValueError("augmented must be None: the net has num_conditions 0")
    if augmented is None and net.num_conditions:
        augmented = x_t.new_zeros(x_t.shape[0], net.num_conditions)
    return label, augmented


def zero(layer: nn.Conv2d | nn.Linear) -> None:
    """Make the layer's output 0: at the start, a residual branch that ends in it adds nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
