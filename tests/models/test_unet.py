"""Properties of the U-Net beyond its parity with diffusers."""

import itertools
import math
from dataclasses import replace
from time import sleep

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm.config.tree import UNetConfig
from ddpm.models import precision
from ddpm.models.layers import sinusoids
from ddpm.models.unet import UNet, build

CONFIG = UNetConfig(
    image_size=8,
    channels=1,
    base_width=8,
    width_multipliers=(1, 2),
    blocks_per_resolution=1,
    attention_resolutions=(4,),
    norm_groups=4,
    zero_init=False,
)
CLASSES = replace(CONFIG, num_classes=3)
BATCH = 4

VARIANTS = [
    pytest.param(config, time, id=f"{'time' if time else 'no time'}, {config.num_classes} classes")
    for config, time in itertools.product((CONFIG, CLASSES), (True, False))
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(batch: int = BATCH) -> Tensor:
    """Noise in the memory order of ddpm.utils.images: [B, H, W, C] viewed as [B, C, H, W]."""
    return torch.randn(batch, 8, 8, 1).permute(0, 3, 1, 2)


def timesteps(time_conditional: bool = True) -> Tensor | None:
    return torch.tensor([0, 1, 500, 999]) if time_conditional else None


# Conditions


@pytest.mark.parametrize("config, time", VARIANTS)
def test_every_weight_has_a_gradient(config: UNetConfig, time: bool):
    net = build(config, time_conditional=time)
    out = net(images(), timesteps(time))
    assert out.shape == (BATCH, 1, 8, 8)
    out.square().sum().backward()
    for name, weight in net.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_unused_conditions_have_no_weights():
    every = {"time_mlp", "label_embedding", "augment_embedding", "shifts"}

    def conditioned(net: UNet) -> set[str]:
        return {name.split(".")[0] for name, _ in net.named_parameters()} & every

    assert conditioned(build(CLASSES, num_conditions=7)) == every
    assert conditioned(build(CONFIG, time_conditional=False, num_conditions=7)) == {
        "augment_embedding",
        "shifts",
    }
    assert conditioned(build(CLASSES)) == every - {"augment_embedding"}
    assert conditioned(build(CONFIG)) == {"time_mlp", "shifts"}
    assert conditioned(build(CLASSES, time_conditional=False)) == {"label_embedding", "shifts"}
    assert conditioned(build(CONFIG, time_conditional=False)) == set()


@pytest.mark.parametrize("time", [True, False])
def test_no_label_is_the_null_label(time: bool):
    net = build(CLASSES, time_conditional=time)
    x_t = images()
    t = timesteps(time)
    null = torch.full((BATCH,), CLASSES.num_classes)
    assert torch.equal(net(x_t, t), net(x_t, t, null))
    assert not torch.allclose(net(x_t, t), net(x_t, t, null - 1), atol=1e-3)


@pytest.mark.parametrize("time", [True, False])
def test_images_that_were_not_augmented_need_no_condition(time: bool):
    net = build(CONFIG, time_conditional=time, num_conditions=7)
    x_t = images()
    t = timesteps(time)
    told = torch.zeros(BATCH, 7)
    assert torch.equal(net(x_t, t), net(x_t, t, None, told))
    assert not torch.allclose(net(x_t, t), net(x_t, t, None, told + 1), atol=1e-3)
    if time:
        plain = build(CONFIG)
        plain.load_state_dict({k: v for k, v in net.state_dict().items() if "augment" not in k})
        assert torch.allclose(plain(x_t, t), net(x_t, t), atol=1e-6)


def test_embeddings_depend_on_the_relative_timestep():
    long = build(CONFIG)
    short = build(CONFIG, num_timesteps=100)
    short.load_state_dict(long.state_dict())
    x_t = images()
    t = torch.tensor([0, 1, 50, 99])
    assert torch.equal(short(x_t, t), long(x_t, 10 * t))
    assert not torch.allclose(short(x_t, t), long(x_t, t), atol=1e-3)


def test_sinusoidal_embeddings():
    embedded = sinusoids(torch.tensor([0, 3]), 6)
    speeds = [1, 0.01, 0.0001]  # a geometric series from 1 to 1/10000
    expected = [
        [0, 0, 0, 1, 1, 1],
        [math.sin(3 * speed) for speed in speeds] + [math.cos(3 * speed) for speed in speeds],
    ]
    assert torch.allclose(embedded, torch.tensor(expected, dtype=torch.float32), atol=1e-6)


@pytest.mark.parametrize(
    "config, time, arguments, message",
    [
        (CONFIG, True, (None,), "t must be a tensor of timesteps"),
        (CONFIG, False, (timesteps(),), "t must be None"),
        (CONFIG, True, (timesteps(), torch.zeros(BATCH, dtype=torch.int64)), "label must be None"),
        (CONFIG, True, (timesteps(), None, torch.zeros(BATCH, 7)), "augmented must be None"),
    ],
)
def test_an_unexpected_condition_is_an_error(config, time, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(config, time_conditional=time)(images(), *arguments)


# Initialization


def test_zero_init_starts_at_zero_and_every_block_is_the_identity():
    net = build(replace(CLASSES, zero_init=True))
    out = net(images(), timesteps())
    assert torch.equal(out, torch.zeros_like(out))
    x = torch.randn(2, 16, 4, 4)
    shift = torch.randn(2, 16, 1, 1)
    for block in net.middle:
        assert torch.equal(block(x, shift), x)
    assert not torch.equal(build(CONFIG).middle[0](x, shift), x)


# Precision and memory


def test_autocast_is_used_only_inside_the_net(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "CPU_CAPABILITY", "AVX512")
    exact = build(CONFIG)
    cast = build(CONFIG, autocast_dtype=torch.bfloat16)
    cast.load_state_dict(exact.state_dict())
    inside: list[torch.dtype] = []
    cast.middle[0].register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    x_t = images()
    t = timesteps()
    before = x_t.clone()
    out = cast(x_t, t)
    assert inside == [torch.bfloat16]
    assert out.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(x_t, before)
    assert 0 < (out - exact(x_t, t)).abs().max() < 0.1
    out.sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in cast.parameters())


def test_a_float32_net_stays_float32_inside_a_callers_autocast():
    net = build(CONFIG)
    x_t = images()
    t = timesteps()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x_t, t)
    assert torch.equal(out, net(x_t, t))


@pytest.mark.parametrize("contiguous", [False, True])
def test_image_tensors_are_channels_last_everywhere(contiguous: bool):
    net = build(replace(CONFIG, channels=3))
    other: list[str] = []

    def look(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.ndim == 4 and not output.is_contiguous(memory_format=torch.channels_last):
                other.append(name)

        module.register_forward_hook(hook)

    for name, module in net.named_modules():
        look(name, module)
    x_t = torch.randn(BATCH, 8, 8, 3).permute(0, 3, 1, 2)
    net(x_t.contiguous() if contiguous else x_t, timesteps())
    assert other == []


# Together with other features of torch


@pytest.mark.parametrize("config, time", VARIANTS)
def test_the_net_compiled_to_one_graph_equals_the_eager_net(config: UNetConfig, time: bool):
    net = build(config, time_conditional=time)
    x_t = images()
    t = timesteps(time)
    results = []
    for module in (net, torch.compile(net, fullgraph=True, backend="eager")):
        net.zero_grad()
        out = module(x_t, t)
        out.square().mean().backward()
        results.append([out, *(weight.grad for weight in net.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_compiled_net_is_the_eager_net_in_half_precision(monkeypatch: pytest.MonkeyPatch):
    net = build(CLASSES, autocast_dtype=torch.bfloat16)
    x_t = images()
    t = timesteps()
    out = torch.compile(net, fullgraph=True, backend="eager")(x_t, t)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the group norm of a compiled net
    assert torch.equal(out, net(x_t, t))


@pytest.mark.parametrize("config, time", VARIANTS)
def test_ddp_needs_no_search_for_unused_parameters(config, time, tmp_path):
    # DDP raises at the second step if a weight got no gradient, and warns if its memory order changes.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = DistributedDataParallel(build(config, time_conditional=time))
        for _ in range(2):
            model(images(), timesteps(time)).square().sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())
    finally:
        # Gloo's threads need the GIL to release finished work, but destroying the group holds the GIL while it waits
        # for them (torch 2.13): so give them time to finish first, also on a busy machine.
        sleep(1)
        torch.distributed.destroy_process_group()


# Sizes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 9}, "image_size is 9"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 1}, "image_size is 1"),
        ({"channels": 0}, "channels is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"base_width": 7}, "base_width is 7"),
        ({"base_width": 2}, "base_width is 2"),
        ({"width_multipliers": ()}, r"width_multipliers is \(\)"),
        ({"width_multipliers": (1, 0)}, r"width_multipliers is \(1, 0\)"),
        ({"blocks_per_resolution": 0}, "blocks_per_resolution is 0"),
        ({"attention_resolutions": (16,)}, r"attention_resolutions is \(16,\)"),
        ({"attention_head_dim": 3}, r"attention_head_dim is 3"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0"),
        ({"norm_groups": 3}, r"norm_groups is 3"),
        ({"norm_groups": 0}, "norm_groups is 0"),
        ({"dropout": 1.0}, r"dropout is 1.0"),
    ],
)
def test_invalid_sizes_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        build(replace(CONFIG, **changes))


def test_zero_timesteps_are_an_error():
    with pytest.raises(ValueError, match="num_timesteps is 0"):
        build(CONFIG, num_timesteps=0)


def test_a_head_width_is_only_checked_where_there_is_attention():
    # 16 divides the width at 4x4, which has attention, but not the width 8 at 8x8, which has none.
    build(replace(CONFIG, attention_head_dim=16))
    with pytest.raises(ValueError, match=r"attention_head_dim is 16; .* \[8, 16\]"):
        build(replace(CONFIG, attention_head_dim=16, attention_resolutions=(8,)))
