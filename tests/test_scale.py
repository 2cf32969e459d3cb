"""benchmarks/scale.py: the arithmetic behind docs/scale.md, with known answers."""

import re
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from support.processes import REPO

from ddpm.presets import CIFAR10


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "benchmarks")
        import scale

        yield scale
    del sys.modules["scale"]


def test_an_all_reduce_of_one_costs_nothing_and_of_many_twice_the_gradient(scale: ModuleType) -> None:
    assert scale.all_reduce_s(1, 1e9) == 0
    sending = scale.all_reduce_s(8, 1e9) - 2 * 3 * scale.public("latency")
    assert sending * scale.public("nvlink") * scale.public("bus_share") == pytest.approx(2 * 7 / 8 * 1e9)
    assert scale.all_reduce_s(256, 1e9) > scale.all_reduce_s(8, 1e9)


def test_the_flops_of_a_net_are_those_of_its_convolutions(scale: ModuleType) -> None:
    """The net of Ho et al. for CIFAR-10 has 6.1 G multiply-adds: Fang et al. 2023 (arXiv:2305.10924), Table 1."""
    assert scale.flops_per_image(CIFAR10) / 3 / 2 == pytest.approx(6.1e9, rel=0.03)


def test_a_slow_link_shows_once_the_backward_pass_no_longer_hides_it(
    scale: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = scale.Measured(20_000, 5_000, 4, 1e9, 1e9, 100, 1e-6)
    hidden = scale.plan(CIFAR10, 256, 0.2, measured)
    assert hidden.step_s == scale.plan(CIFAR10, 1, 0.2, measured).step_s
    monkeypatch.setitem(scale.PUBLIC, "network", (1e9, "a slow one"))
    shown = scale.plan(CIFAR10, 256, 0.2, measured)
    assert shown.step_s - hidden.step_s == pytest.approx(shown.all_reduce_s - 2 / 3 * hidden.step_s)


def test_faster_reading_needs_fewer_cores(scale: ModuleType) -> None:
    measured = scale.Measured(20_000, 5_000, 4, 1e9, 1e9, 100, 1e-6)
    plans = [scale.plan(CIFAR10, 8, 0.2, replace(measured, raw_rows=rows)) for rows in (20_000, 40_000)]
    assert plans[0].cores == pytest.approx(2 * plans[1].cores)
    assert plans[0].bytes == plans[1].bytes == pytest.approx(plans[0].images * 32 * 32 * 3)


def test_the_page_has_the_numbers_of_this_script(scale: ModuleType) -> None:
    text = scale.OUT.read_text()
    assert {gpus for gpus in scale.GPUS if re.search(rf"^\| `cifar10` \| {gpus} \|", text, re.M)} == set(
        scale.GPUS
    )
    assert all(source in text for _, source in scale.PUBLIC.values())
