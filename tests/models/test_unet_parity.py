"""Our U-Net against diffusers' UNet2DModel with the same weights: outputs and gradients of all weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddpm.config.tree import UNetConfig
from ddpm.export.diffusers_config import diffusers_names
from ddpm.models.unet import UNet, build

diffusers = pytest.importorskip("diffusers")

SMALL = UNetConfig(
    image_size=8, base_width=16, width_multipliers=(1, 2), attention_resolutions=(4,), norm_groups=4
)
CONFIGS = {
    "cifar10-style": replace(
        SMALL, image_size=32, width_multipliers=(1, 2, 2, 2), attention_resolutions=(16,)
    ),
    "attention at two resolutions": replace(SMALL, attention_resolutions=(8, 4)),
    "attention heads": replace(SMALL, attention_head_dim=8, attention_resolutions=(8, 4)),
    "one channel, 8x8": replace(SMALL, channels=1, width_multipliers=(1, 2, 2), blocks_per_resolution=1),
    "three blocks": replace(SMALL, blocks_per_resolution=3),
    "no attention": replace(SMALL, attention_resolutions=(), middle_attention=False),
    "classes": replace(SMALL, num_classes=3),
    "one resolution": replace(SMALL, width_multipliers=(1,), attention_resolutions=(8,)),
    "widths that shrink and start doubled": replace(
        SMALL, width_multipliers=(2, 3, 1), attention_resolutions=(2,)
    ),
}
CIFAR10 = UNetConfig(  # google/ddpm-cifar10-32
    image_size=32,
    base_width=128,
    width_multipliers=(1, 2, 2, 2),
    blocks_per_resolution=2,
    attention_resolutions=(16,),
    norm_groups=32,
)


def reference(config: UNetConfig):
    """UNet2DModel in the configuration of google/ddpm-cifar10-32, with the sizes of `config`."""
    sizes = [config.image_size >> level for level in range(len(config.width_multipliers))]
    attention = ["Attn" if size in config.attention_resolutions else "" for size in sizes]
    return diffusers.UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.channels,
        out_channels=config.channels,
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=[f"{kind}DownBlock2D" for kind in attention],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(attention)],
        block_out_channels=[config.base_width * multiplier for multiplier in config.width_multipliers],
        layers_per_block=config.blocks_per_resolution,
        downsample_padding=0,
        dropout=config.dropout,
        act_fn="silu",
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_groups,
        norm_eps=1e-6,
        add_attention=config.middle_attention,
        num_class_embeds=config.num_classes + 1 if config.num_classes else None,
    )


def pair(config: UNetConfig) -> tuple[UNet, torch.nn.Module]:
    """Both nets with the reference's weights, changed so that none has its initial value (0 or 1)."""
    torch.manual_seed(0)
    net = build(config)
    theirs = reference(config)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    net.load_state_dict(renamed(config, theirs.state_dict()))
    return net, theirs


def renamed(config: UNetConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        our: torch.cat([theirs[name] for name in names]) for our, names in diffusers_names(config).items()
    }


def assert_equal_nets(config: UNetConfig, batch: int) -> None:
    net, theirs = pair(config)
    x_t = torch.randn(batch, config.channels, config.image_size, config.image_size)
    t = torch.randint(0, 1000, (batch,))
    label = torch.randint(0, config.num_classes + 1, (batch,)) if config.num_classes else None
    direction = torch.randn_like(x_t) / x_t[0].numel() ** 0.5

    ours_out = net(x_t, t, label)
    theirs_out = theirs(x_t, t, label).sample
    assert theirs_out.std() > 0.1
    assert (ours_out - theirs_out).abs().max() < 1e-5

    (ours_out * direction).sum().backward()
    (theirs_out * direction).sum().backward()
    expected = renamed(config, {name: weight.grad for name, weight in theirs.named_parameters()})
    for name, weight in net.named_parameters():
        scale = expected[name].abs().max()
        assert scale > 1e-4, name
        assert (weight.grad - expected[name]).abs().max() < 1e-5 * max(1, scale), name


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_equal_those_of_diffusers(name):
    assert_equal_nets(CONFIGS[name], batch=3)


def test_the_full_cifar10_net_equals_that_of_diffusers():
    assert sum(weight.numel() for weight in build(CIFAR10).parameters()) == 35_746_307
    assert_equal_nets(CIFAR10, batch=1)
