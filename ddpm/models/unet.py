"""The U-Net that predicts eps (or x_0, or v) from x_t.

The network of Ho et al. 2020 (arXiv:2006.11239), Appendix B: residual blocks with group normalisation at
every resolution, self-attention at some, and the Transformer's sinusoidal embedding of t (Vaswani et al.
2017, arXiv:1706.03762) added inside each residual block. A label is embedded and added to the embedding of t;
an extra row is the null label of classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598). With the
weights of google/ddpm-cifar10-32 it computes what diffusers' UNet2DModel computes.

Axes: B batch, C channels, H W pixels, E width of the embedding of t and label.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.models.layers import (
    EMBEDDED_TIMESTEPS,
    MAX_BLOCKS,
    MAX_SIZE,
    Block,
    Downsample,
    GroupNorm,
    Upsample,
    check_conditions,
    sinusoids,
    zero,
)

if TYPE_CHECKING:
    from ddpm.config import UNetConfig


def build(
    config: UNetConfig,
    *,
    time_conditional: bool = True,
    autocast_dtype: torch.dtype | None = None,
    num_timesteps: int = EMBEDDED_TIMESTEPS,
    out_channels: int | None = None,
) -> UNet:
    """The net of a config, with fresh weights drawn from torch's global generator.

    Args:
        config: the sizes; `ddpm.config.UNetConfig` explains each.
        time_conditional: False makes a net without weights for t, to be called with t = None.
        autocast_dtype: dtype of the computation, torch.bfloat16 for example; None: float32, as the weights.
        out_channels: channels of the prediction; None: those of the images.
        num_timesteps: T, at least 1. The net embeds t * 1000 / T, which means about the same noise for any T.

    Raises:
        ValueError: sizes are out of range or do not fit together; the message names the parameter.
    """
    _check(config, num_timesteps)
    net = UNet(config, time_conditional, autocast_dtype, num_timesteps, out_channels or config.channels)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
    return net


class UNet(nn.Module):
    """The whole net; `build` checks the sizes and makes one."""

    def __init__(
        self,
        config: UNetConfig,
        time_conditional: bool,
        autocast_dtype: torch.dtype | None,
        num_timesteps: int,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.time_conditional = time_conditional
        self.num_classes = config.num_classes
        self.autocast_dtype = autocast_dtype
        self.time_scale = EMBEDDED_TIMESTEPS / num_timesteps

        widths = [config.base_width * multiplier for multiplier in config.width_multipliers]
        sizes = [config.image_size >> level for level in range(len(widths))]
        self.shift_widths: list[int] = []

        def block(width_in: int, width_out: int, attention: bool) -> Block:
            self.shift_widths.append(width_out)
            return Block(width_in, width_out, attention, config)

        width = widths[0]
        self.conv_in = nn.Conv2d(config.channels, width, 3, padding=1)

        # Down: the outputs of conv_in and of every layer are kept for the up path.
        self.down = nn.ModuleList()
        kept = [width]
        for level_width, size in zip(widths, sizes, strict=True):
            for _ in range(config.blocks_per_resolution):
                self.down.append(block(width, level_width, size in config.attention_resolutions))
                width = level_width
                kept.append(width)
            if size != sizes[-1]:
                self.down.append(Downsample(width))
                kept.append(width)

        self.middle = nn.ModuleList(
            [block(width, width, attention) for attention in (config.middle_attention, False)]
        )

        # Up: each block takes one kept output, so a resolution has one block more than on the down path.
        self.up = nn.ModuleList()
        for level_width, size in zip(reversed(widths), reversed(sizes), strict=True):
            for _ in range(config.blocks_per_resolution + 1):
                self.up.append(block(width + kept.pop(), level_width, size in config.attention_resolutions))
                width = level_width
            if size != sizes[0]:
                self.up.append(Upsample(width))

        self.norm_out = GroupNorm(config.norm_groups, width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

        # A condition that is not used has no weights: DDP would wait for their gradients.
        self.sinusoid_width, embedding_width = widths[0], 4 * widths[0]
        if time_conditional:
            self.time_mlp = nn.Sequential(
                nn.Linear(self.sinusoid_width, embedding_width),
                nn.SiLU(),
                nn.Linear(embedding_width, embedding_width),
            )
        if config.num_classes:
            self.label_embedding = nn.Embedding(config.num_classes + 1, embedding_width)
        if time_conditional or config.num_classes:
            self.shifts = nn.Linear(embedding_width, sum(self.shift_widths))

        if config.zero_init:
            zero(self.conv_out)

    def forward(self, x_t: Tensor, t: Tensor | None, label: Tensor | None = None) -> Tensor:
        """Predict for each image, independently of the others in the batch.

        Args:
            x_t: [B, C, H, W] float32.
            t: [B] int64 in [0, T); None for a net that is not time-conditional.
            label: [B] int64 in [0, num_classes]; num_classes is the null label, None the null label for all.

        Returns:
            The prediction, float32 [B, out_channels, H, W].

        Raises:
            ValueError: t or label is given to a net that does not take it, or t is missing.
        """
        label = check_conditions(self, x_t, t, label)
        with torch.autocast(x_t.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            shifts = self._shifts(t, label)
            h = self.conv_in(x_t.contiguous(memory_format=torch.channels_last))
            kept = [h]
            for layer in self.down:
                h = layer(h, next(shifts)) if isinstance(layer, Block) else layer(h)
                kept.append(h)
            for layer in self.middle:
                h = layer(h, next(shifts))
            for layer in self.up:
                if isinstance(layer, Block):
                    h = layer(torch.cat([h, kept.pop()], dim=1), next(shifts))
                else:
                    h = layer(h)
            out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out.float()

    def _shifts(self, t: Tensor | None, label: Tensor | None) -> Iterator[Tensor | None]:
        """The shift of t and label for every pixel, [B, C, 1, 1], block by block; None if there is neither."""
        conditions = []
        if t is not None:
            conditions.append(self.time_mlp(sinusoids(t * self.time_scale, self.sinusoid_width)))  # [B, E]
        if label is not None:
            conditions.append(self.label_embedding(label))  # [B, E]
        if not conditions:
            return itertools.repeat(None)
        # One product for all blocks is faster than one per block.
        shifts: Tensor = self.shifts(F.silu(torch.stack(conditions).sum(dim=0)))
        return iter(shifts[:, :, None, None].split(self.shift_widths, dim=1))


def _check(config: UNetConfig, num_timesteps: int) -> None:
    """Raise ValueError for sizes that make no net; the message says the value and what would be right."""

    def require(true: bool, name: str, right: str) -> None:
        if not true:
            got = num_timesteps if name == "num_timesteps" else getattr(config, name)
            raise ValueError(f"{name} is {got}; it must be {right}")

    require(num_timesteps >= 1, "num_timesteps", "at least 1")
    require(1 <= config.channels <= MAX_SIZE, "channels", f"at least 1, and at most {MAX_SIZE}")
    classes = f"0 (unconditional) or the number of classes, at most {MAX_SIZE}"
    require(0 <= config.num_classes <= MAX_SIZE, "num_classes", classes)
    blocks = f"at least 1, and at most {MAX_BLOCKS}"
    require(1 <= config.blocks_per_resolution <= MAX_BLOCKS, "blocks_per_resolution", blocks)
    require(0 <= config.dropout < 1, "dropout", "in [0, 1)")
    multipliers = config.width_multipliers
    require(len(multipliers) >= 1 and min(multipliers) >= 1, "width_multipliers", "one or more integers >= 1")

    widths = [config.base_width * multiplier for multiplier in multipliers]
    require(config.base_width >= 4 and config.base_width % 2 == 0, "base_width", "even and at least 4")
    require(max(multipliers) <= MAX_SIZE, "width_multipliers", f"at most {MAX_SIZE}")
    most = MAX_SIZE // max(multipliers)
    require(config.base_width <= most, "base_width", f"at most {most}: no width may exceed {MAX_SIZE}")
    divides = config.norm_groups >= 1 and all(width % config.norm_groups == 0 for width in widths)
    require(divides, "norm_groups", f"a divisor of each of the widths {widths}")

    size, grain = config.image_size, 2 ** (len(widths) - 1)
    multiple = f"a multiple of {grain}: it is halved {len(widths) - 1} times"
    require(size >= grain and size % grain == 0, "image_size", multiple)
    require(size <= MAX_SIZE, "image_size", f"at most {MAX_SIZE}")
    sizes = [size >> level for level in range(len(widths))]
    example = next((s for s in sizes if s <= 16), sizes[-1])
    among = f"among {sizes}, such as --model.attention-resolutions {example}"
    require(set(config.attention_resolutions) <= set(sizes), "attention_resolutions", among)

    head_dim = config.attention_head_dim
    attended = {widths[sizes.index(size)] for size in config.attention_resolutions}
    if config.middle_attention:
        attended.add(widths[-1])
    fits = head_dim is None or (head_dim >= 1 and all(width % head_dim == 0 for width in attended))
    require(fits, "attention_head_dim", f"None or a divisor of {sorted(attended)}, the widths attended")
