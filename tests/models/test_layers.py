"""Our own layers against those of torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.models.layers import FEW_PIXELS, NORM_EPS, GroupNorm, attend

SHAPE = (3, 12, 6, 4)


def images(mean: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels-last noise with a different mean and deviation in each channel."""
    B, C, H, W = SHAPE
    noise = torch.randn(B, H, W, C) * torch.linspace(0.5, 2, C) + torch.linspace(-1, 1, C) + mean
    return noise.permute(0, 3, 1, 2).to(dtype).requires_grad_()


def norm(groups: int) -> GroupNorm:
    layer = GroupNorm(groups, SHAPE[1])
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def errors(layer: GroupNorm, x: Tensor) -> dict[str, float]:
    """How far output and gradients are from those of torch's layer in float64, relative to the largest."""
    weights = [x, layer.weight, layer.bias]
    exact = [weight.detach().double().requires_grad_() for weight in weights]
    y = layer(x)
    dy = torch.randn(SHAPE)
    expected = F.group_norm(exact[0], layer.num_groups, *exact[1:], NORM_EPS)
    got = [y, *torch.autograd.grad(y, weights, dy.to(y.dtype))]
    wanted = [expected, *torch.autograd.grad(expected, exact, dy.to(y.dtype).double())]
    names = ("y", "x", "weight", "bias")
    return {
        name: ((a - b).abs().max() / b.abs().max()).item()
        for name, a, b in zip(names, got, wanted, strict=True)
    }


@pytest.mark.parametrize("groups", [1, 3, 4, 12])
def test_group_norm_equals_that_of_torch(groups: int) -> None:
    worst = errors(norm(groups), images())
    assert all(error < 1e-6 for error in worst.values()), worst


def test_group_norm_of_a_bright_image_is_accurate() -> None:
    # Mean square minus squared mean would lose all digits of the variance here.
    worst = errors(norm(3), images(mean=4096.0))
    assert all(error < 1e-3 for error in worst.values()), worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_without_gradients_is_that_of_torch(dtype: torch.dtype) -> None:
    layer = norm(3)
    x = images(dtype=dtype)
    with torch.no_grad():
        expected = F.group_norm(x.float(), 3, layer.weight, layer.bias, NORM_EPS)
        assert torch.equal(layer(x), expected.to(dtype))


def test_group_norm_in_half_precision_rounds_once() -> None:
    worst = errors(norm(3), images(dtype=torch.bfloat16))
    assert worst["y"] < 2**-8 and worst["x"] < 2**-8  # half a unit in the last place
    assert worst["weight"] < 1e-6 and worst["bias"] < 1e-6


def test_group_norm_keeps_memory_order_and_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = images(dtype=dtype)
        y = norm(3)(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        for made in (y, dx):
            assert made.dtype == dtype
            assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_equals_that_of_torch(heads: int) -> None:
    q, k, v = qkv = torch.randn(3, 2, heads, 24, 8).requires_grad_()
    got = attend(q, k, v)
    wanted = F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(got, wanted, atol=1e-6)
    direction = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(out, qkv, direction, retain_graph=True)[0] for out in (got, wanted))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_attention_with_many_pixels_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = F.scaled_dot_product_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked.append(q.shape[2])
        return real(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    for n in (FEW_PIXELS, FEW_PIXELS + 1):
        attend(*torch.randn(3, 1, 1, n, 4))
    assert asked == [FEW_PIXELS + 1]
