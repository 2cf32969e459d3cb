"""What is stored of latents, and what a net sees of them."""

import pytest
import torch

from ddpm.latents.scaling import Scaling
from ddpm.utils import images

Z = (
    torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    * torch.tensor([0.5, 2.0, 9.0])[:, None, None]
    + torch.tensor([-1.0, 0.0, 4.0])[:, None, None]
)
SCALING = Scaling(mean=(-1.0, 0.0, 4.0), std=(0.5, 2.0, 9.0), limit=4.0)


def test_latents_are_restored_within_half_a_level() -> None:
    restored = SCALING.from_uint8(SCALING.to_uint8(Z))
    level = torch.tensor(SCALING.std)[:, None, None] * SCALING.limit / 127.5
    inside = (
        (Z - torch.tensor(SCALING.mean)[:, None, None]) / torch.tensor(SCALING.std)[:, None, None]
    ).abs() < 4
    assert ((restored - Z).abs() / level)[inside].max() <= 0.5001
    assert SCALING.clipped_share(Z) == pytest.approx(1 - inside.float().mean().item())


def test_a_net_sees_a_standard_deviation_of_one_half() -> None:
    x_0 = images.to_model(SCALING.to_uint8(Z), SCALING.x_0_max)
    assert SCALING.x_0_max == 2.0
    assert x_0.std((0, 2, 3)).tolist() == pytest.approx([0.5] * 3, rel=0.03)
    torch.testing.assert_close(SCALING.from_x_0(x_0), SCALING.from_uint8(SCALING.to_uint8(Z)))
