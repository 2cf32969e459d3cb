"""Builders of what a config describes: net, schedule, objective, sampler; and a net together with its config.

Axes: N images, C channels, H W, T timesteps.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm.config import kinds
from ddpm.config.tree import Config, ObjectiveConfig, SampleConfig, ScheduleConfig
from ddpm.diffusion import augmentation, guidance, samplers, timesteps
from ddpm.diffusion.guidance import clip
from ddpm.diffusion.objectives import LabelConditioning, Objective
from ddpm.diffusion.reverse import fixed_variance
from ddpm.diffusion.samplers import Sampler
from ddpm.diffusion.schedules import Schedule
from ddpm.latents.scaling import Decoder
from ddpm.utils import images
from ddpm.utils.errors import UserError
from ddpm.utils.seeding import Purpose, torch_seed


@dataclass(frozen=True)
class TrainedNet:
    """A net and the config it is trained under, which defines what its output means."""

    net: nn.Module
    config: Config
    class_names: tuple[str, ...] = field(default=(), kw_only=True)
    """By label; empty: unknown, or the net has no classes."""
    decoder: Decoder | None = field(default=None, kw_only=True)
    """Makes images of latents; None: the net generates images."""

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
        x_0 = images.to_model(torch.tensor(image).to(self.device), self.config.data.x_0_max)
        return x_0, torch.tensor(label).to(self.device) if self.config.model.num_classes else None

    def images(self, x: Tensor) -> Tensor:
        """What the net generates, x_0 or an x_t [N, C, H, W], as images, uint8 [N, H, W, C]; latents are decoded."""
        if self.decoder is not None:
            return self.decoder.images(x)
        if self.config.data.latents is not None:
            raise UserError("the net generates latents, and their autoencoder was not loaded")
        return images.to_uint8(x / self.config.data.x_0_max)


def build_net(config: Config) -> nn.Module:
    """The net that `config` describes, with weights drawn from the run's seed."""
    settings = {"num_conditions": augmentation.CONDITIONS} if config.data.augment else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.train.seed, Purpose.INIT))
        try:
            net: nn.Module = importlib.import_module(config.model.module).build(
                config.model,
                time_conditional=kinds.objective(config.objective.process).uses_time,
                autocast_dtype=torch.bfloat16 if config.train.precision == "bfloat16" else None,
                num_timesteps=config.schedule.num_timesteps,
                out_channels=config.model.channels * (2 if config.objective.variance == "learned" else 1),
                **settings,
            )
            return net
        except ValueError as error:
            raise UserError(f"model: {error}") from None


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The noise schedule that `config` describes."""
    kind = kinds.find("schedule.kind", config.kind)
    read = [key.removeprefix("schedule.") for key in kind.reads]
    settings = {name: getattr(config, name) for name in read}
    schedule: Schedule = kind.load()(config.num_timesteps, **settings)
    return schedule


def build_objective(config: Config) -> Objective:
    """The objective that `config` describes."""
    own = config.objective
    kind = kinds.objective(own.process)
    if own.variance == "learned" and not kind.has_bound:
        raise UserError(f"variance is 'learned'; {own.process} has no bound to learn it from")
    try:
        objective: Objective = kind.build(
            config=own,
            schedule=build_schedule(config.schedule),
            labels=LabelConditioning(config.model.num_classes, own.label_dropout),
            prediction=kinds.find("objective.predict", own.predict).load(),
            x_0_max=config.data.x_0_max,
        )
        return objective
    except ValueError as error:
        raise UserError(str(error)) from None


def resolve_sample(sample: SampleConfig, objective: ObjectiveConfig) -> SampleConfig:
    """`sample` with the sampler and variance `auto` replaced by those that fit the objective."""
    learned = objective.variance == "learned"
    if sample.variance == "learned" and not learned:
        raise UserError("variance is learned, but this net did not learn it; use beta or beta_tilde")
    process = kinds.objective(objective.process).process
    sampler = sample.sampler
    if sampler == kinds.AUTO:
        sampler = kinds.default_sampler(process)
    elif kinds.sampler(sampler).process != process:
        fitting = kinds.samplers_of(process)
        raise UserError(f"sampler {sampler} cannot undo the process {process}; use {' or '.join(fitting)}")
    variance = sample.variance
    if variance == "auto":
        variance = "learned" if learned else "beta_tilde"
    return replace(sample, sampler=sampler, variance=variance)


def with_sampler(sample: SampleConfig, sampler: str | None, objective: ObjectiveConfig) -> SampleConfig:
    """`sample` with another sampler; None: with its own.

    The number of steps stays, except where the sampler becomes ddpm: then it is T, as for ddpm by default. A number of
    steps that was chosen for a sampler of few steps would spoil its images.
    """
    if sampler is None:
        return sample
    steps = sample.num_sample_steps
    if sampler != resolve_sample(sample, objective).sampler and kinds.is_known("sample.sampler", sampler):
        steps = steps if kinds.sampler(sampler).num_sample_steps else None
    return replace(sample, sampler=sampler, num_sample_steps=steps)


def num_sample_steps(sample: SampleConfig, num_timesteps: int) -> int:
    """The number of steps of a resolved `sample`; T is num_timesteps."""
    if sample.num_sample_steps is not None:
        return sample.num_sample_steps
    kind = kinds.sampler(sample.sampler)
    if kind.num_sample_steps is None:
        return num_timesteps
    if "sample.spacing" in kind.reads:
        return min(kind.num_sample_steps, num_timesteps)
    return kind.num_sample_steps


def build_sampler(config: Config) -> Sampler:
    """The sampler that config.sample describes, on the run's own schedule."""
    sample = resolve_sample(config.sample, config.objective)
    if config.model.num_classes and sample.guidance_scale != 1 and config.objective.label_dropout == 0:
        saw = "guidance needs a net that saw images without their labels, and objective.label_dropout was 0"
        raise UserError(f"{saw}; set sample.guidance_scale to 1")
    function = kinds.sampler(sample.sampler).load()
    try:
        guidance.check_interval(sample.guidance_interval)
        return bind_sampler(
            function, sample, build_schedule(config.schedule), config.model.num_dims, config.data.x_0_max
        )
    except ValueError as error:
        raise UserError(f"sample: {error}") from None


def bind_sampler(
    function: Callable[..., Tensor],
    sample: SampleConfig,
    schedule: Schedule,
    num_dims: int,
    x_0_max: float = 1.0,
) -> Sampler:
    """The sampler `function` with the settings of a resolved `sample`, for x_0 of num_dims numbers in
    [-x_0_max, x_0_max].

    Its parameters get, by their names, the settings that its kind reads, and: num_sample_steps, schedule, timesteps (if
    it reads sample.spacing), variance (sample.variance), threshold (sample.clip_x_0 or sample.mean). They are checked
    here, not at the first sample after hours of training.
    """
    kind = kinds.sampler(sample.sampler)
    n = num_sample_steps(sample, schedule.num_timesteps)
    timesteps.check_num_sample_steps(n)
    read = [key.removeprefix("sample.") for key in kind.reads]
    available = {name: getattr(sample, name) for name in read}
    available["num_sample_steps"] = n
    available["schedule"] = schedule
    clip_x_0 = partial(clip, x_0_max=x_0_max)
    if "eta" in read:
        samplers.check_eta(sample.eta)
    if "spacing" in read:
        available["timesteps"] = build_timesteps(sample, schedule, num_dims)
    if "mean" in read:
        available["threshold"] = clip_x_0 if sample.mean == "clipped" else None
    if "clip_x_0" in read:
        available["threshold"] = clip_x_0 if sample.clip_x_0 else None
    if "variance" in read and sample.variance == "learned":
        available["variance"] = None
    elif "variance" in read:
        chain = timesteps.respaced(schedule, available["timesteps"])
        available["variance"] = fixed_variance(chain, sample.variance)
    settings = kinds.accepted(function, available)
    return lambda denoise, noise, on_step=None: function(denoise, noise=noise, on_step=on_step, **settings)


def build_timesteps(sample: SampleConfig, schedule: Schedule, num_dims: int) -> list[int]:
    """The timesteps that a resolved `sample` visits, for images of num_dims numbers."""
    kind = kinds.sampler(sample.sampler)
    n = num_sample_steps(sample, schedule.num_timesteps)
    timesteps.check_num_sample_steps(n, schedule.num_timesteps)
    chosen: list[int] = pkgutil.resolve_name(kind.timesteps)(
        schedule,
        n,
        spacing=kind.spacing if sample.spacing == kinds.AUTO else sample.spacing,
        rho=sample.rho,
        sigma_max=timesteps.SIGMA_MAX * num_dims**0.5,
        sigma_min=sample.sigma_min,
    )
    return chosen
