"""Builders of what a config describes: the net, the objective, the sampler."""

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.config import Config, ObjectiveConfig, SampleConfig
from ddpm.diffusion import denoisers, inpainting, samplers, schedules
from ddpm.diffusion.inpainting import Known
from ddpm.diffusion.objectives import PROCESSES, Objective
from ddpm.diffusion.objectives import build as _build_objective
from ddpm.diffusion.samplers import SAMPLERS, Sampler
from ddpm.utils.errors import UserError
from ddpm.utils.seeding import Purpose, torch_seed


def build_net(config: Config) -> nn.Module:
    """The net that `config` describes, with weights drawn from the run's seed.

    Raises:
        UserError: the config describes no net that can be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.train.seed, Purpose.INIT))
        try:
            net: nn.Module = importlib.import_module(config.model.module).build(
                config.model,
                time_conditional=PROCESSES[config.objective.process].uses_time,
                autocast_dtype=torch.bfloat16 if config.train.precision == "bfloat16" else None,
                num_timesteps=config.schedule.num_timesteps,
                out_channels=config.model.channels * (2 if config.objective.variance == "learned" else 1),
            )
            return net
        except ValueError as error:
            raise UserError(f"model: {error}") from None


def build_objective(config: Config) -> Objective:
    """The objective that `config` describes.

    Raises:
        UserError: a schedule or objective parameter is out of its range.
    """
    try:
        return _build_objective(config.objective, schedules.build(config.schedule), config.model.num_classes)
    except ValueError as error:
        raise UserError(str(error)) from None


def resolve_sample(sample: SampleConfig, objective: ObjectiveConfig) -> SampleConfig:
    """`sample` with the sampler and variance `auto` replaced by those that fit the objective.

    Raises:
        UserError: the sampler is of another process, or the net has not learned the variance.
    """
    learned = objective.variance == "learned"
    if sample.variance == "learned" and not learned:
        raise UserError(
            "variance is learned, but this net did not learn it; use beta, beta_tilde or measured"
        )
    fitting = [name for name, kind in SAMPLERS.items() if kind.process == objective.process]
    if sample.sampler not in ("auto", *fitting):
        raise UserError(
            f"sampler {sample.sampler} cannot undo the process {objective.process}; use {' or '.join(fitting)}"
        )
    sampler = fitting[0] if sample.sampler == "auto" else sample.sampler
    variance = ("learned" if learned else "beta_tilde") if sample.variance == "auto" else sample.variance
    resolved: dict[str, Any] = {"sampler": sampler, "variance": variance}
    return dataclasses.replace(sample, **resolved)


def build_sampler(
    config: Config,
    sample: SampleConfig | None = None,
    known: Known | None = None,
    x_0_error: Tensor | None = None,
) -> Sampler:
    """The sampler that `sample` (default: config.sample) describes, on the run's own schedule.

    `known`, a given part of each image, selects RePaint, whatever `sample` says. The variance "measured" needs
    x_0_error, [T].

    Raises:
        UserError: the sampler cannot reverse the process the net was trained on, or a setting is out of its range.
    """
    sample = sample or config.sample
    if known is not None:
        sample = dataclasses.replace(sample, sampler="ddpm")
    resolved = resolve_sample(sample, config.objective)
    try:
        denoisers.check_interval(resolved.guidance_interval)
        schedule = schedules.build(config.schedule)
        if known is None:
            return samplers.build(resolved, schedule, config.model.num_dims, x_0_error)
        resampling = known.num_resamples, known.jump_length
        return inpainting.build(resolved, schedule, known.x_0, known.mask, *resampling)
    except ValueError as error:
        raise UserError(f"sample: {error}") from None
