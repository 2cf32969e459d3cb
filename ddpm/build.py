"""From a config to what it describes: the net, the objective, the sampler."""

from dataclasses import replace

import torch
from torch import Tensor

from ddpm.config import Config, SampleConfig
from ddpm.diffusion import denoisers, inpainting, samplers, schedules
from ddpm.diffusion.inpainting import Known
from ddpm.diffusion.objectives import Objective
from ddpm.diffusion.objectives import build as _build_objective
from ddpm.diffusion.samplers import Sampler
from ddpm.models import unet
from ddpm.utils.errors import UserError
from ddpm.utils.seeding import Purpose, torch_seed


def build_net(config: Config) -> unet.UNet:
    """The net that `config` describes, its weights drawn from the run's seed.

    Raises:
        UserError: the config describes no net that can be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.train.seed, Purpose.INIT))
        try:
            return unet.build(
                config.model,
                time_conditional=config.objective.process != "uniform_mix",
                autocast_dtype=torch.bfloat16 if config.train.precision == "bfloat16" else None,
                num_timesteps=config.schedule.num_timesteps,
                out_channels=config.model.channels * (2 if config.objective.variance == "learned" else 1),
            )
        except ValueError as error:
            raise UserError(f"model: {error}") from None


def build_objective(config: Config) -> Objective:
    """The objective that `config` describes.

    Raises:
        UserError: a schedule or objective parameter out of its range.
    """
    try:
        return _build_objective(config.objective, schedules.build(config.schedule), config.model.num_classes)
    except ValueError as error:
        raise UserError(str(error)) from None


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
        sample = replace(sample, sampler="ancestral")
    resolved = sample.resolved(config.objective)
    try:
        denoisers.check_interval(resolved.guidance_interval)
        schedule = schedules.build(config.schedule)
        if known is None:
            return samplers.build(resolved, schedule, config.model.num_dims, x_0_error)
        resampling = known.num_resamples, known.jump_length
        return inpainting.build(resolved, schedule, known.x_0, known.mask, *resampling)
    except ValueError as error:
        raise UserError(f"sample: {error}") from None
