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
    Downsample,
    GroupNorm,
    Requirement,
    ResidualBlock,
    Upsample,
    check_conditions,
    check_sizes,
    sinusoids,
    zero,
)
from ddpm.models.precision import autocast

if TYPE_CHECKING:
    from ddpm.config.tree import UNetConfig


class UNet(nn.Module):
    """The whole net, with fresh weights drawn from torch's global generator.

    Args:
        config: the sizes; `ddpm.config.tree.UNetConfig` explains each.
        time_conditional: False makes a net without weights for t, to be called with t = None.
        autocast_dtype: dtype of the computation, torch.bfloat16 for example; None: float32, as the weights.
        out_channels: channels of the prediction; None: those of the images.
        num_timesteps: T, at least 1. The net embeds t * 1000 / T, which means about the same noise for any T.
        num_conditions: numbers in the augmentation condition; 0: the net has none. Their embedding has no bias, so it
            is 0 for an image that was not augmented (Karras et al. 2022, arXiv:2206.00364, Appendix F.2).
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        time_conditional: bool = True,
        autocast_dtype: torch.dtype | None = None,
        num_timesteps: int = EMBEDDED_TIMESTEPS,
        out_channels: int | None = None,
        num_conditions: int = 0,
    ) -> None:
        check_sizes(config, num_timesteps, _requirements(config))
        super().__init__()
        self.time_conditional = time_conditional
        self.num_classes = config.num_classes
        self.num_conditions = num_conditions
        self.autocast_dtype = autocast_dtype
        self.time_scale = EMBEDDED_TIMESTEPS / num_timesteps

        widths = [config.base_width * multiplier for multiplier in config.width_multipliers]
        sizes = [config.image_size >> level for level in range(len(widths))]
        self.shift_widths: list[int] = []

        def block(width_in: int, width_out: int, attention: bool) -> ResidualBlock:
            self.shift_widths.append(width_out)
            return ResidualBlock(width_in, width_out, attention, config)

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
        self.conv_out = nn.Conv2d(width, out_channels or config.channels, 3, padding=1)

        self._build_conditions(config, time_conditional)

        if config.zero_init:
            zero(self.conv_out)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's annotations

    def _build_conditions(self, config: UNetConfig, time_conditional: bool) -> None:
        """The layers of the conditions. One that is not used has no weights: DDP would wait for their gradients."""
        self.sinusoid_width = config.base_width * config.width_multipliers[0]
        embedding_width = 4 * self.sinusoid_width
        if time_conditional:
            self.time_mlp = nn.Sequential(
                nn.Linear(self.sinusoid_width, embedding_width),
                nn.SiLU(),
                nn.Linear(embedding_width, embedding_width),
            )
        if config.num_classes:
            self.label_embedding = nn.Embedding(config.num_classes + 1, embedding_width)
        if self.num_conditions:
            self.augment_embedding = nn.Linear(self.num_conditions, embedding_width, bias=False)
        if time_conditional or config.num_classes or self.num_conditions:
            self.shifts = nn.Linear(embedding_width, sum(self.shift_widths))

    def forward(
        self, x_t: Tensor, t: Tensor | None, label: Tensor | None = None, augmented: Tensor | None = None
    ) -> Tensor:
        """Predict for each image, independently of the others in the batch.

        Args:
            x_t: [B, C, H, W] float32.
            t: [B] int64 in [0, T); None for a net that is not time-conditional.
            label: [B] int64 in [0, num_classes]; num_classes is the null label, None the null label for all.
            augmented: [B, num_conditions], how each image was augmented; None: not at all.

        Returns:
            The prediction, float32 [B, out_channels, H, W].
        """
        label, augmented = check_conditions(self, x_t, t, label, augmented)
        with autocast(x_t.device, self.autocast_dtype):
            shifts = self._shifts(t, label, augmented)
            h = self.conv_in(x_t.contiguous(memory_format=torch.channels_last))
            kept = [h]
            for layer in self.down:
                h = layer(h, next(shifts)) if isinstance(layer, ResidualBlock) else layer(h)
                kept.append(h)
            for layer in self.middle:
                h = layer(h, next(shifts))
            for layer in self.up:
                if isinstance(layer, ResidualBlock):
                    h = layer(torch.cat([h, kept.pop()], dim=1), next(shifts))
                else:
                    h = layer(h)
            out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out.float()

    def _shifts(
        self, t: Tensor | None, label: Tensor | None, augmented: Tensor | None
    ) -> Iterator[Tensor | None]:
        """The shift of the conditions for every pixel, [B, C, 1, 1], block by block; None if there are none."""
        conditions = []
        if t is not None:
            conditions.append(self.time_mlp(sinusoids(t * self.time_scale, self.sinusoid_width)))  # [B, E]
        if label is not None:
            conditions.append(self.label_embedding(label))  # [B, E]
        if augmented is not None:
            conditions.append(self.augment_embedding(augmented))  # [B, E]
        if not conditions:
            return itertools.repeat(None)
        # One product for all blocks is faster than one per block.
        shifts: Tensor = self.shifts(F.silu(torch.stack(conditions).sum(dim=0)))
        return iter(shifts[:, :, None, None].split(self.shift_widths, dim=1))


build = UNet


def _requirements(c: UNetConfig) -> Iterator[Requirement]:
    blocks = f"at least 1, and at most {MAX_BLOCKS}"
    yield "blocks_per_resolution", 1 <= c.blocks_per_resolution <= MAX_BLOCKS, blocks
    multipliers = c.width_multipliers
    yield "width_multipliers", min(multipliers, default=0) >= 1, "one or more integers >= 1"
    yield "width_multipliers", max(multipliers) <= MAX_SIZE, f"at most {MAX_SIZE}"
    yield "base_width", c.base_width >= 4 and c.base_width % 2 == 0, "even and at least 4"
    max_width = MAX_SIZE // max(multipliers)
    yield "base_width", c.base_width <= max_width, f"at most {max_width}: no width may exceed {MAX_SIZE}"
    widths = [c.base_width * multiplier for multiplier in multipliers]
    divides = c.norm_groups >= 1 and all(width % c.norm_groups == 0 for width in widths)
    yield "norm_groups", divides, f"a divisor of each of the widths {widths}"

    size = c.image_size
    grain = 2 ** (len(widths) - 1)
    multiple = f"a multiple of {grain}: it is halved {len(widths) - 1} times"
    yield "image_size", size >= grain and size % grain == 0, multiple
    yield "image_size", size <= MAX_SIZE, f"at most {MAX_SIZE}"
    sizes = [size >> level for level in range(len(widths))]
    example = next((s for s in sizes if s <= 16), sizes[-1])
    among = f"among {sizes}, such as --model.attention-resolutions {example}"
    yield "attention_resolutions", set(c.attention_resolutions) <= set(sizes), among

    head_dim = c.attention_head_dim
    attended = {widths[sizes.index(size)] for size in c.attention_resolutions}
    if c.middle_attention:
        attended.add(widths[-1])
    fits = head_dim is None or (head_dim >= 1 and all(width % head_dim == 0 for width in attended))
    yield "attention_head_dim", fits, f"None or a divisor of {sorted(attended)}, the widths attended"
