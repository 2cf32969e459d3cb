"""Sampling from a net: image i depends only on the seed and i."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ddpm.build import TrainedNet
from ddpm.config import Config
from ddpm.config_io import override
from ddpm.sampling import generate
from ddpm.training.state import State

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sample.sampler": "ddpm"},
        {"sample.sampler": "dpmpp_2m", "sample.dynamic_threshold": 0.9},
        {"sample.sampler": "heun"},
        {"objective.process": "uniform_mix"},
    ],
    ids=str,
)
def test_image_i_does_not_depend_on_its_batch(tiny: Config, change: dict[str, Any]) -> None:
    config = override(tiny, {"model.zero_init": False, **change})
    trained = TrainedNet(State.create(config, CPU).ema.net, config)
    together = generate.draw(trained, range(6))
    alone = generate.draw(trained, [4])
    reordered = generate.draw(trained, [5, 4])
    # Another batch size may use other kernels: at most one grey level of difference.
    assert (together[4].int() - alone[0].int()).abs().max() <= 1
    assert (together[4].int() - reordered[1].int()).abs().max() <= 1
    assert (together[4] != together[5]).any()
    other = generate.draw(trained.sampled_with(replace(config.sample, seed=1)), [4])
    assert (other[0].int() - alone[0].int()).abs().max() > 1


def test_guidance_applies_only_in_its_interval(tiny: Config) -> None:
    config = override(tiny, {"model.zero_init": False, "model.num_classes": 10, "sample.sampler": "heun"})
    trained = TrainedNet(State.create(config, CPU).ema.net, config)

    def sampled(**changes: Any) -> torch.Tensor:
        return generate.draw(trained.sampled_with(replace(config.sample, **changes)), range(3))

    guided, plain = sampled(guidance_scale=5.0), sampled()
    assert not torch.equal(guided, plain)
    assert torch.equal(sampled(guidance_scale=5.0, guidance_interval=(0.0, 1e9)), guided)
    assert torch.equal(sampled(guidance_scale=5.0, guidance_interval=(1e6, 1e9)), plain)
    partly = sampled(guidance_scale=5.0, guidance_interval=(0.5, 5.0))
    assert not torch.equal(partly, plain) and not torch.equal(partly, guided)
