"""Masks from keys: their bits, their statistics, and what they do not depend on."""

from dataclasses import replace

import pytest
import torch
from support import examples
from torch import Tensor, nn

from ddpm.config.tree import UNetConfig
from ddpm.models import dropout, unet
from ddpm.models.dropout import Dropout

dit = examples.load("dit", "ddpm_dit.net")

P = 0.1
N = 16_384
"""Elements of an image."""


def keys(*shape: int, seed: int = 0) -> Tensor:
    """Keys of random bits, [..., 2]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (*shape, 2), generator=generator, dtype=torch.int32)


def kept(key: Tensor, shape: tuple[int, ...] = (N,), p: float = P) -> Tensor:
    """Which elements of each image are kept: bool [B, *shape]."""
    layer = Dropout(p)
    with dropout.keyed([layer], key[None]):
        out: Tensor = layer(torch.ones(len(key), *shape))
    assert set(out.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p)).item()}
    return out > 0


def standardised(key: Tensor) -> Tensor:
    """Masks with mean 0 and variance 1 if each element is kept with probability 1 - P, [B, N]."""
    return (kept(key).float() - (1 - P)) / (P * (1 - P)) ** 0.5


def mix(h: int) -> int:
    """MurmurHash3's 32-bit finaliser, as published: of 1 it is 514e28b7."""
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def test_masks_have_the_documented_bits() -> None:
    assert mix(1) == 0x514E28B7
    assert kept(torch.tensor([[1, 2]], dtype=torch.int32), (24,), 0.5).int().tolist() == [
        [1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    ]
    key = torch.cat([keys(5), torch.tensor([[-(2**31), 2**31 - 1], [0, -1]], dtype=torch.int32)])
    for p in (0.001, P, 0.5, 1 - 2**-33):
        for image, (offset, factor) in zip(kept(key, (3, 300), p), key.tolist(), strict=True):
            hashed = [mix((offset + (2 * factor + 1) * mix(n)) % 2**32) for n in range(900)]
            signed = [(h ^ 2**31) for h in hashed]  # an int32 plus 2^31
            assert image.flatten().tolist() == [h >= int(p * 2**32) for h in signed]


def test_mean_and_variance() -> None:
    """The share of dropped elements in 512 masks: per image, per element, and in all of them together."""
    mask = standardised(keys(512))
    for sums, bound in ((mask.sum(1) / N**0.5, 4.5), (mask.sum(0) / 512**0.5, 5.5)):
        assert sums.abs().max() < bound
        assert sums.var() == pytest.approx(1, abs=0.15)
    assert abs(mask.mean().item()) * (512 * N) ** 0.5 < 4
    assert mask.var().item() == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("others", ["random", "equal factors", "equal offsets"])
def test_images_layers_and_steps_are_independent(others: str) -> None:
    """They differ in their key only. Every pair of 512 is uncorrelated, also if keys differ by one in one word."""
    key = keys(512)
    if others != "random":
        key = torch.zeros_like(key)
        key[:, int(others == "equal offsets")] = torch.arange(512)
    mask = standardised(key)
    correlation = (mask @ mask.T / N**0.5)[torch.ones(512, 512).triu(1) > 0]
    # Of 130,816 normal numbers, one in a hundred tries is larger than 5.3.
    assert correlation.abs().max() < 5.5
    assert correlation.var().item() == pytest.approx(1, abs=0.02)


def test_neighbouring_elements_are_independent() -> None:
    mask = standardised(keys(256))
    for lag in (*range(1, 17), 32, 64, 96, 128, 512, 1024, 4096):
        products = (mask[:, lag:] * mask[:, :-lag]).sum(1) / (N - lag) ** 0.5
        assert products.abs().max() < 5, lag
        assert abs(products.mean().item()) * 256**0.5 < 4, lag
        assert products.var().item() == pytest.approx(1, abs=0.4), lag


def test_a_mask_depends_neither_on_the_batch_nor_on_the_order_of_memory() -> None:
    key = keys(6)
    layer = Dropout(0.5)
    x = torch.randn(6, 4, 3, 2)
    with dropout.keyed([layer], key[None]):
        whole = layer(x)
        last = layer(x.to(memory_format=torch.channels_last))
    assert torch.equal(whole, last) and last.is_contiguous(memory_format=torch.channels_last)
    with dropout.keyed([layer], key[None, 4:]):
        assert torch.equal(layer(x[4:]), whole[4:])


def test_the_mean_is_unbiased_in_half_precision() -> None:
    """1 / 0.9 in bfloat16 is 0.16 % too small: it is not rounded before the product."""
    layer = Dropout(P)
    x = torch.linspace(1, 2, N, dtype=torch.bfloat16).repeat(64, 1).requires_grad_()
    with dropout.keyed([layer], keys(1, 64)):
        y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, x.detach())
    assert y.dtype == torch.bfloat16 and torch.equal(gradient, y)
    kept = y > 0
    assert (y[kept].double() / x[kept].double()).mean().item() == pytest.approx(1 / (1 - P), rel=2e-4)


UNET = UNetConfig(
    image_size=8, channels=1, base_width=8, width_multipliers=(1, 2), blocks_per_resolution=1, dropout=0.3
)
NETS = [
    unet.build(replace(UNET, attention_resolutions=(4,), norm_groups=4, zero_init=False)),
    dit.build(dit.DiTConfig(image_size=8, channels=1, dropout=0.3, width=16, depth=3, num_heads=2)),
]


@pytest.fixture(params=NETS, ids=["unet", "dit"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    """A net with the same random weights in every test."""
    torch.manual_seed(0)
    for weight in request.param.parameters():
        nn.init.normal_(weight, std=0.2)
    return request.param


class TestNets:
    def test_only_training_drops_and_needs_keys(self, net: nn.Module) -> None:
        layers = dropout.layers(net)
        assert len(layers) == (8 if isinstance(net, unet.UNet) else 3)
        x_t = torch.randn(4, 1, 8, 8)
        t = torch.arange(4)
        with pytest.raises(ValueError, match=r"dropout\.keyed"):
            net(x_t, t)
        outs = []
        for seed in (0, 0, 1):
            with dropout.keyed(layers, keys(len(layers), 4, seed=seed)):
                outs.append(net(x_t, t))
        assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])
        with pytest.raises(ValueError, match="dropout has no keys"):
            net(x_t, t)  # keys are for one pass
        assert torch.equal(net.eval()(x_t, t), net(x_t, t))
        net.train()

    def test_other_keys_are_no_reason_to_compile_again(self, net: nn.Module) -> None:
        torch.compiler.reset()
        layers = dropout.layers(net)
        x_t = torch.randn(4, 1, 8, 8)
        t = torch.arange(4)
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        for seed, stance in enumerate(["default", "fail_on_recompile", "fail_on_recompile"]):
            key = keys(len(layers), 4, seed=seed)
            with torch.compiler.set_stance(stance), dropout.keyed(layers, key):
                out = compiled(x_t, t)
            with dropout.keyed(layers, key):
                torch.testing.assert_close(out, net(x_t, t), rtol=1e-4, atol=1e-5)


def test_a_layer_of_torch_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"^1 is an nn\.Dropout"):
        dropout.layers(net)
    net[1].p = 0.0
    assert dropout.layers(net) == []


@pytest.mark.slow
def test_a_compiled_mask_has_the_same_bits() -> None:
    """Wrapping products are also what the compiler's code computes."""
    layer = Dropout(P)
    x = torch.randn(8, 4099)
    key = keys(1, 8)
    compiled = torch.compile(layer, fullgraph=True)
    with dropout.keyed([layer], key):
        assert torch.equal(compiled(x), layer(x))
