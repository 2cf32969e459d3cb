"""Augmentation that does not leak into samples: the net is conditioned on how each image was changed.

Each transformation is applied to an image with the same probability, and its parameters are a further input of the net.
They are zero for an unchanged image, and when sampling, so samples look like images that are not augmented.

Source: Karras et al. 2022 (arXiv:2206.00364), Appendix F.2.

Axes: B batch, C channels, H W pixels.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.diffusion.objectives import Loss, Model
from ddpm.diffusion.rng import Rng

LossOf = Callable[[Model, Tensor, Tensor | None, Rng, float], Loss]
"""The method `loss` of an objective."""
CONDITIONS = 7
"""Numbers that describe an image's augmentation: two flips, scale, cosine and sine of the rotation, two shifts."""
SCALE_STD = 0.2
"""Standard deviation of the scale's binary logarithm."""
SHIFT_STD = 1 / 8
"""Standard deviation of a shift, in widths of the image."""


def augmented(loss_of: LossOf, probability: float) -> LossOf:
    """`loss_of` for augmented images and an augmentation-conditioned net; with probability 0 `loss_of` itself."""
    if probability == 0:
        return loss_of

    def loss(model: Model, x_0: Tensor, label: Tensor | None, generator: Rng, progress: float) -> Loss:
        x_0, conditions = augment(x_0, probability, generator)
        conditioned: Model = partial(model, augmented=conditions)  # type: ignore[call-arg]
        return loss_of(conditioned, x_0, label, generator, progress)

    return loss


def augment(x_0: Tensor, probability: float, generator: Rng) -> tuple[Tensor, Tensor]:
    """Flip left-right and top-bottom, scale, rotate and shift, each with `probability`; edges are reflected.

    Args:
        x_0: [B, C, H, W], of H = W.

    Returns:
        The images, and the net's input [B, CONDITIONS]; an image that is not changed keeps its bits.
    """
    B = len(x_0)
    applied = (generator.uniform([B, 5]) < probability).to(x_0.dtype)
    angle = 2 * math.pi * generator.uniform([B]) * applied[:, 3]
    normal = generator.normal([B, 3])
    mirror = 1 - 2 * applied[:, :2]
    log_scale = normal[:, 0] * applied[:, 2]
    shift = normal[:, 1:] * applied[:, 4:]
    # From a pixel of the result to its place in the image, both in [-1, 1].
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], dim=1).unflatten(1, (2, 2))
    linear = mirror[:, :, None] * turn * torch.exp2(-SCALE_STD * log_scale)[:, None, None]
    offset = linear @ (-2 * SHIFT_STD * shift[:, :, None])
    grid = F.affine_grid(torch.cat([linear, offset], dim=2), list(x_0.shape), align_corners=False)
    changed = F.grid_sample(x_0, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    x_0 = torch.where(applied.any(1)[:, None, None, None], changed, x_0)
    conditions = [applied[:, :2], log_scale[:, None], angle.cos()[:, None] - 1, angle.sin()[:, None], shift]
    return x_0, torch.cat(conditions, dim=1)
