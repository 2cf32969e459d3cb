"""The averaged weights against closed forms."""

import math

import pytest
import torch
from support.tiny import TINY_NET
from torch import nn

from ddpm.build import build_net
from ddpm.models.ema import EMA

WARM = 10**9  # a step long after the warm-up


def one_weight(value: float) -> nn.Linear:
    net = nn.Linear(1, 1, bias=False)
    set_weight(net, value)
    return net


def set_weight(net: nn.Linear, value: float) -> None:
    with torch.no_grad():
        net.weight.fill_(value)


def test_the_effect_of_a_jump_decays_geometrically():
    net = one_weight(5.0)
    ema = EMA(net, decay=0.9)
    set_weight(net, 2.0)
    for n in range(1, 30):
        ema.update(net, WARM)
        assert ema.net.weight.item() == pytest.approx(2 + 3 * 0.9**n, rel=1e-6)


def test_the_product_of_warm_up_decays_is_a_binomial():
    # prod over s < n of (1 + s) / (10 + s) = n! 9! / (n + 9)! = 1 / C(n + 9, 9)
    net = one_weight(1.0)
    ema = EMA(net, decay=0.9999)
    set_weight(net, 0.0)
    for n in range(1, 20):
        ema.update(net, step=n - 1)
        assert ema.net.weight.item() == pytest.approx(1 / math.comb(n + 9, 9), rel=1e-5)


def test_the_decay_rises_from_a_tenth_to_its_final_value():
    ema = EMA(one_weight(0.0), decay=0.99)
    assert ema.decay_at(0) == 0.1
    assert ema.decay_at(80) == 0.9
    assert ema.decay_at(889) == 890 / 899
    assert ema.decay_at(891) == 0.99
    assert ema.decay_at(WARM) == 0.99


def test_buffers_are_copied_not_averaged():
    net = nn.BatchNorm1d(2)
    ema = EMA(net, decay=0.9)
    for _ in range(3):
        net(torch.randn(8, 2) + 10)
    ema.update(net, WARM)
    assert ema.net.num_batches_tracked == 3
    assert torch.equal(ema.net.running_mean, net.running_mean)
    assert ema.net.running_mean.min() > 1


def test_the_averaged_net_is_a_copy_for_evaluation():
    net = build_net(TINY_NET)
    ema = EMA(net, decay=0.9)
    ema.update(net, 0)
    assert net.training and not ema.net.training
    assert not any(weight.requires_grad for weight in ema.net.parameters())
    assert all(weight.requires_grad for weight in net.parameters())
    for averaged, weight in zip(ema.net.parameters(), net.parameters(), strict=True):
        assert averaged.data_ptr() != weight.data_ptr()
        assert averaged.grad_fn is None
        assert averaged.stride() == weight.stride()  # channels-last, so that one kernel averages all weights


def test_a_restored_state_continues_where_it_was_saved():
    net = one_weight(1.0)
    first = EMA(net, decay=0.9)
    set_weight(net, 3.0)
    first.update(net, 5)
    second = EMA(one_weight(-7.0), decay=0.9)
    second.net.load_state_dict({name: weight.clone() for name, weight in first.state_dict().items()})
    for ema in (first, second):
        ema.update(net, 6)
    assert first.state_dict().keys() == {"weight"}
    assert torch.equal(first.net.weight, second.net.weight)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_out_of_range_is_an_error(decay):
    with pytest.raises(ValueError, match=rf"decay is {decay}"):
        EMA(one_weight(0.0), decay)
