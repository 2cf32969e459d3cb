"""Sampling from a net: image i depends only on the seed and i."""

import dataclasses
from typing import Any

import pytest
import torch

from ddpm.build import build_objective
from ddpm.config import Config, override
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
    net, objective = State.create(config, CPU).ema.net, build_objective(config)
    together = generate.draw(net, config, objective, range(6), device=CPU)
    alone = generate.draw(net, config, objective, [4], device=CPU)
    reordered = generate.draw(net, config, objective, [5, 4], device=CPU)
    # Another batch size may use other kernels: at most one grey level of difference.
    assert (together[4].int() - alone[0].int()).abs().max() <= 1
    assert (together[4].int() - reordered[1].int()).abs().max() <= 1
    assert (together[4] != together[5]).any()
    other = generate.draw(
        net, config, objective, [4], device=CPU, sample=dataclasses.replace(config.sample, seed=1)
    )
    assert (other[0].int() - alone[0].int()).abs().max() > 1


def test_guidance_applies_only_in_its_interval(tiny: Config) -> None:
    config = override(tiny, {"model.zero_init": False, "model.num_classes": 10, "sample.sampler": "heun"})
    net, objective = State.create(config, CPU).ema.net, build_objective(config)

    def sampled(**changes: Any) -> torch.Tensor:
        sample = dataclasses.replace(config.sample, **changes)
        return generate.draw(net, config, objective, range(3), device=CPU, sample=sample)

    guided, plain = sampled(guidance_scale=5.0), sampled()
    assert not torch.equal(guided, plain)
    assert torch.equal(sampled(guidance_scale=5.0, guidance_interval=(0.0, 1e9)), guided)
    assert torch.equal(sampled(guidance_scale=5.0, guidance_interval=(1e6, 1e9)), plain)
    partly = sampled(guidance_scale=5.0, guidance_interval=(0.5, 5.0))
    assert not torch.equal(partly, plain) and not torch.equal(partly, guided)
