"""Builders of what a config describes: the net, the objective, the sampler; and a net together with its config.

Axes: N images, C channels, H W, T timesteps.
"""

import importlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm.config import Config, ObjectiveConfig, SampleConfig
from ddpm.diffusion import augmentation, denoisers, samplers, schedules
from ddpm.diffusion.objectives import PROCESSES, Objective
from ddpm.diffusion.objectives import build as _build_objective
from ddpm.diffusion.samplers import SAMPLERS, Sampler
from ddpm.utils import images
from ddpm.utils.errors import UserError
from ddpm.utils.seeding import Purpose, torch_seed


@dataclass(frozen=True)
class TrainedNet:
    """A net and the config it is trained under, which tells what its output means."""

    net: nn.Module
    config: Config

    @cached_property
    def objective(self) -> Objective:
        return build_objective(self.config)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def sampled_with(self, sample: SampleConfig) -> Self:
        """The same net with another sampling configuration."""
        return replace(self, config=replace(self.config, sample=sample))

    def inputs(self, image: NDArray[np.uint8], label: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """x_0 [N, C, H, W] of images [N, H, W, C], and their labels [N] if the net takes them, on its device."""
        x_0 = images.to_model(torch.tensor(image).to(self.device))
        return x_0, torch.tensor(label).to(self.device) if self.config.model.num_classes else None


def build_net(config: Config) -> nn.Module:
    """The net that `config` describes, with weights drawn from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.train.seed, Purpose.INIT))
        try:
            net: nn.Module = importlib.import_module(config.model.module).build(
                config.model,
                time_conditional=PROCESSES[config.objective.process].uses_time,
                autocast_dtype=torch.bfloat16 if config.train.precision == "bfloat16" else None,
                num_timesteps=config.schedule.num_timesteps,
                out_channels=config.model.channels * (2 if config.objective.variance == "learned" else 1),
                **({"num_conditions": augmentation.CONDITIONS} if config.data.augment else {}),
            )
            return net
        except ValueError as error:
            raise UserError(f"model: {error}") from None


def build_objective(config: Config) -> Objective:
    """The objective that `config` describes."""
    try:
        return _build_objective(config.objective, schedules.build(config.schedule), config.model.num_classes)
    except ValueError as error:
        raise UserError(str(error)) from None


def resolve_sample(sample: SampleConfig, objective: ObjectiveConfig) -> SampleConfig:
    """`sample` with the sampler and variance `auto` replaced by those that fit the objective."""
    learned = objective.variance == "learned"
    if sample.variance == "learned" and not learned:
        raise UserError("variance is learned, but this net did not learn it; use beta or beta_tilde")
    fitting = [name for name, kind in SAMPLERS.items() if kind.process == objective.process]
    if sample.sampler not in ("auto", *fitting):
        raise UserError(
            f"sampler {sample.sampler} cannot undo the process {objective.process}; use {' or '.join(fitting)}"
        )
    sampler = fitting[0] if sample.sampler == "auto" else sample.sampler
    variance = ("learned" if learned else "beta_tilde") if sample.variance == "auto" else sample.variance
    resolved: dict[str, Any] = {"sampler": sampler, "variance": variance}
    return replace(sample, **resolved)


def build_sampler(config: Config) -> Sampler:
    """The sampler that config.sample describes, on the run's own schedule."""
    sample = config.sample
    resolved = resolve_sample(sample, config.objective)
    if config.model.num_classes and sample.guidance_scale != 1 and config.objective.label_dropout == 0:
        saw = "guidance needs a net that saw images without their labels, and objective.label_dropout was 0"
        raise UserError(f"{saw}; set sample.guidance_scale to 1")
    try:
        denoisers.check_interval(resolved.guidance_interval)
        return samplers.build(resolved, schedules.build(config.schedule), config.model.num_dims)
    except ValueError as error:
        raise UserError(f"sample: {error}") from None
