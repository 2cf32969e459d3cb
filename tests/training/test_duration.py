"""How long training takes: operations against known ones, a second of measuring, and a warning of days."""

import time

import pytest

from ddpm.build import build_net
from ddpm.config.json import override
from ddpm.config.presets import PRESETS
from ddpm.config.tree import Config
from ddpm.training import duration, mfu


def test_operations_are_those_of_a_real_net(tiny: Config) -> None:
    assert duration.flops_per_image(tiny) == mfu.flops_per_image(build_net(tiny), tiny)
    # 6.06 G multiplications a forward pass; an addition with each; the backward pass takes twice as many
    assert duration.flops_per_image(PRESETS["cifar10"]) == pytest.approx(6 * 6.06e9, rel=0.05)


def test_measuring_takes_a_second_or_two(tiny: Config) -> None:
    start = time.monotonic()
    assert duration.measured_images_per_s(tiny) > 0
    assert time.monotonic() - start > duration.MEASURED_S


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "folder"])
def test_what_is_for_cpus_is_not_warned_of(name: str) -> None:
    assert duration.warning(PRESETS[name], 2) is None


def test_days_on_cpus_are_warned_of() -> None:
    config = PRESETS["cifar10"]
    assert "110.6 days or more on 2 CPU cores" in (duration.warning(config, 2) or "")
    assert duration.warning(config, 1000) is None
    assert duration.warning(override(config, {"train.total_images": 1280}), 2) is None
    assert "--total-images" in (
        duration.warning(override(PRESETS["digits"], {"train.total_images": 10**10}), 1) or ""
    )
