"""Objectives: the net's prediction target, and how its output is read.

An objective does two things: `loss` corrupts clean images and scores the net (training), `denoise` turns
the net's output into x_0_hat and eps_hat (sampling, evaluation). One short class per meaning of the output.

A model is any callable model(x_t, t, label) that returns a tensor like x_t, or with twice its channels if the variance
is learned. It may compute in half precision; everything around it is in the dtype of the images, float32.

Papers:
    Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239 (eps)
    Salimans & Ho 2022, Progressive Distillation, arXiv:2202.00512 (v)
    Karras et al. 2022, Elucidating the Design Space (EDM), arXiv:2206.00364
    Liu et al. 2022, Rectified Flow, arXiv:2209.03003 (flow); Esser et al. 2024, arXiv:2403.03206 (logit-normal t)
    Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting, arXiv:2303.09556
    Ho & Salimans 2022, Classifier-Free Diffusion Guidance, arXiv:2207.12598 (dropped labels)
    Nichol & Dhariwal 2021, Improved DDPM, arXiv:2102.09672 (learned variance)
    UniformMix: the Hugging Face diffusion course, unit 1

Axes: B batch, C channels, H W height and width, T timesteps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ddpm.diffusion import process, reverse
from ddpm.diffusion.rng import Rng
from ddpm.diffusion.schedules import Schedule

if TYPE_CHECKING:
    from ddpm.config.tree import ObjectiveConfig

Model = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""model(x_t, t, label): x_t [B, C, H, W], scaled by `Edm` and `Flow`; t [B] int64 or None; label [B] int64 or None."""

BOUND_WEIGHT = 1e-3
"""Weight of the bound in the loss of a net that learns its variance (lambda of Nichol & Dhariwal 2021)."""
SMALLEST_AMOUNT = 1e-3
"""Below this amount of noise UniformMix does not divide by it: one grey level of 255 would become 8 units."""


class Loss(NamedTuple):
    """The loss of a batch, also by image and by noise level."""

    value: Tensor
    """[], the weighted mean to descend on."""
    per_image: Tensor
    """[B], the unweighted mean squared error of each image, detached."""
    quarter: Tensor
    """[B] int64 in 0..3: the quarter of the noise levels of each image, 0 the cleanest."""


class Denoised(NamedTuple):
    """The net's prediction at x_t; x_0_hat and eps_hat are consistent: x_t is x_0_hat noised with eps_hat."""

    x_0_hat: Tensor
    """[B, C, H, W], not clipped."""
    eps_hat: Tensor
    """[B, C, H, W]."""
    variance_mix: Tensor | None = None
    """[B, C, H, W], if the net learned its variance: 0 is beta_tilde, 1 is beta, in the logarithm."""


class Objective(Protocol):
    """Interface of an objective and its forward process for the training loop, the samplers and the evaluation."""

    def loss(
        self, model: Model, x_0: Tensor, label: Tensor | None, generator: Rng, progress: float = 1.0
    ) -> Loss:
        """Corrupt `x_0`, and score the prediction of `model`.

        Args:
            x_0: [B, C, H, W] float32, clean images.
            label: [B] int64 in 0..num_classes-1; ignored by an unconditional objective.
            generator: on the device of x_0; all randomness comes from it.
            progress: the share of training that is done, in [0, 1].
        """
        ...

    def denoise(self, model: Model, x_t: Tensor, t: Tensor, label: Tensor | None) -> Denoised:
        """Read the prediction of `model`, called once, at `x_t` [B, C, H, W] float32.

        Args:
            t: [B] int64 in [0, T); for UniformMix the amount of noise, [B] float in [0, 1].
            label: [B] int64 in 0..num_classes; num_classes, or None for all images, means no label.
        """
        ...

    def corrupt(self, x_0: Tensor, level: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 at a noise level in [0, 1], with `noise` of its shape; and its t [B]."""
        ...


@dataclass(frozen=True)
class LabelConditioning:
    """Labels for the net: the null label, num_classes, stands for "no label". Ho & Salimans 2022, Algorithm 1."""

    num_classes: int = 0
    """0 for an unconditional net, which is given None."""
    dropout: float = 0.0
    """In [0, 1], the share of labels dropped in training, image by image."""

    def __post_init__(self) -> None:
        if self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}; it must be 0 (unconditional) or more")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"label_dropout is {self.dropout}; it must be in [0, 1]")

    def for_training(self, label: Tensor | None, generator: Rng) -> Tensor | None:
        """`label` with some entries dropped, independently per image."""
        if self.num_classes == 0:
            return None
        if label is None:
            raise ValueError(f"label is None; with num_classes = {self.num_classes} it must be int64 [B]")
        dropped = generator.uniform(label.shape) < self.dropout
        return label.masked_fill(dropped, self.num_classes)

    def for_denoising(self, label: Tensor | None, x_t: Tensor) -> Tensor | None:
        """`label`, or the null label for every image."""
        if self.num_classes == 0:
            return None
        return label if label is not None else x_t.new_full((len(x_t),), self.num_classes, dtype=torch.int64)


@dataclass(frozen=True)
class Gaussian:
    """Algorithm 1: t over all T steps, eps standard normal, squared error of a prediction.

    A subclass defines the prediction, and may scale the net's input. `weighting` is "simple", all t alike in the space
    of that prediction, or names the weight of the equivalent x_0 loss: "min_snr" min(snr, gamma); "edm" and "flow" that
    of their own losses, for any prediction.

    With `log_sigma`, a mean and a standard deviation, t is the timestep whose log sigma is nearest to a normal number;
    else t is uniform.

    With `learns_variance` the net has twice as many output channels; the second half is 2 variance_mix - 1. The loss is
    L_hybrid: the squared error plus BOUND_WEIGHT times an estimate of the bound in bits/dim, in which the prediction of
    the mean is detached, so that only the variance learns from it. The bound needs `x_0_max`, the largest grey level.

    Source: Ho et al. 2020, Algorithm 1 and Eq. 14; Hang et al. 2023, Sec. 3.4; Nichol & Dhariwal 2021, Sec. 3.1.
    """

    schedule: Schedule
    labels: LabelConditioning = LabelConditioning()
    weighting: str = "simple"
    min_snr_gamma: float = 5.0
    learns_variance: bool = False
    sigma_data: float = 0.5
    log_sigma: tuple[float, float] | None = None
    x_0_max: float = 1.0

    def __post_init__(self) -> None:
        for name in ("min_snr_gamma", "sigma_data"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in (0, inf)")
        if self.learns_variance and self.log_sigma is not None:
            raise ValueError("variance is learned from the bound over all t; timesteps must be uniform")

    def loss(
        self, model: Model, x_0: Tensor, label: Tensor | None, generator: Rng, progress: float = 1.0
    ) -> Loss:
        T = self.schedule.num_timesteps
        t = self.draw_t(len(x_0), generator)
        eps = generator.normal(x_0.shape, x_0.dtype)
        x_t = process.q_sample(self.schedule.alpha_bar, x_0, t, eps)
        output = model(self._input(x_t, t), t, self.labels.for_training(label, generator)).to(x_0.dtype)
        prediction, variance_mix = self._split(output)
        error = per_image(prediction, self._target(x_0, t, eps))
        loss = (process.gather(self.weight, t, error) * error).mean()
        if variance_mix is not None:
            x_0_hat = self._read(prediction.detach(), x_t, t).x_0_hat
            log_variance = reverse.learned_log_variance(self.schedule, t, variance_mix)
            bits = reverse.step_bits(self.schedule, x_0, x_0_hat, t, log_variance, self.x_0_max)
            loss = loss + BOUND_WEIGHT * T * bits.mean()
        return Loss(loss, error.detach(), 4 * t // T)

    def denoise(self, model: Model, x_t: Tensor, t: Tensor, label: Tensor | None) -> Denoised:
        output = model(self._input(x_t, t), t, self.labels.for_denoising(label, x_t)).to(x_t.dtype)
        prediction, variance_mix = self._split(output)
        return self._read(prediction, x_t, t)._replace(variance_mix=variance_mix)

    def corrupt(self, x_0: Tensor, level: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        t = process.same_t(round(level * (self.schedule.num_timesteps - 1)), x_0)
        return process.q_sample(self.schedule.alpha_bar, x_0, t, noise), t

    def draw_t(self, n: int, generator: Rng) -> Tensor:
        """The timesteps of n training images, [n] int64."""
        if self.log_sigma is None:
            return generator.integers(self.schedule.num_timesteps, [n])
        mean, std = self.log_sigma
        wanted = mean + std * generator.normal([n])
        of_t = self.schedule.sigma.log()
        return torch.bucketize(wanted, ((of_t[:-1] + of_t[1:]) / 2).to(wanted, non_blocking=True))

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction, and variance_mix if the net learns it; both [B, C, H, W]."""
        if not self.learns_variance:
            return output, None
        prediction, between = output.chunk(2, dim=1)
        return prediction, (between + 1) / 2

    @property
    def weight(self) -> Tensor:
        """[T] float64, the loss weight of each t."""
        snr = self.schedule.snr
        own = self._snr_per_x_0_error(snr)
        of_x_0_error = {
            "simple": own,
            "min_snr": snr.clamp(max=self.min_snr_gamma),
            "edm": edm_weight(snr, self.sigma_data),
            "flow": flow_weight(snr),
        }
        return of_x_0_error[self.weighting] / own

    def _input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The net's input at x_t."""
        return x_t

    def _target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The target of the net's output."""
        raise NotImplementedError

    def _read(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        """The inverse of `_target`."""
        raise NotImplementedError

    def _snr_per_x_0_error(self, snr: Tensor) -> Tensor:
        """[T]: (squared error of the prediction) / (squared error of the x_0_hat it implies)."""
        raise NotImplementedError


class Eps(Gaussian):
    """The net predicts the noise. Ho et al. 2020, Eq. 14."""

    def _target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return eps

    def _read(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        x_0_hat = process.predict_x_0_from_eps(self.schedule.alpha_bar, x_t, t, prediction)
        return Denoised(x_0_hat, eps_hat=prediction)

    def _snr_per_x_0_error(self, snr: Tensor) -> Tensor:
        return snr


class X0(Gaussian):
    """The net predicts the clean image."""

    def _target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return x_0

    def _read(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        eps_hat = process.predict_eps_from_x_0(self.schedule.alpha_bar, x_t, t, prediction)
        return Denoised(x_0_hat=prediction, eps_hat=eps_hat)

    def _snr_per_x_0_error(self, snr: Tensor) -> Tensor:
        return torch.ones_like(snr)


class V(Gaussian):
    """The net predicts v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0. Salimans & Ho 2022, Sec. 4."""

    def _target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return process.v_from(self.schedule.alpha_bar, x_0, t, eps)

    def _read(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        alpha_bar = self.schedule.alpha_bar
        x_0_hat = process.predict_x_0_from_v(alpha_bar, x_t, t, prediction)
        return Denoised(x_0_hat, process.predict_eps_from_v(alpha_bar, x_t, t, prediction))

    def _snr_per_x_0_error(self, snr: Tensor) -> Tensor:
        return snr + 1


class Edm(Gaussian):
    """EDM: the net is F in D(x; sigma) = c_skip x + c_out F(c_in x), x = x_t / sqrt(alpha_bar) = x_0 + sigma eps.

    With z = c_in x, c_in = 1 / sqrt(sigma^2 + sigma_data^2), cos = c_in sigma_data and sin = c_in sigma:
    z = cos x_0 / sigma_data + sin eps and F = sin x_0 / sigma_data - cos eps, which is -v of images of unit variance.
    (In these numbers c_skip is cos^2, and c_out sin sigma_data.) The weight of F's error is 1. The net is given t in
    place of c_noise; the schedule `geometric` makes the one linear in the other.

    Source: Karras et al. 2022, Eqs. 7 and 8, Table 1 and App. B.6.
    """

    def _target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        cos, sin = self._cos_and_sin(t, x_0)
        return sin / self.sigma_data * x_0 - cos * eps

    def _input(self, x_t: Tensor, t: Tensor) -> Tensor:
        return process.gather(self._c_in / self.schedule.alpha_bar.sqrt(), t, x_t) * x_t

    def _read(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        z = self._input(x_t, t)
        cos, sin = self._cos_and_sin(t, x_t)
        x_0_hat = self.sigma_data * (cos * z + sin * prediction)
        return Denoised(x_0_hat, eps_hat=sin * z - cos * prediction)

    def _snr_per_x_0_error(self, snr: Tensor) -> Tensor:
        return edm_weight(snr, self.sigma_data)

    @property
    def _c_in(self) -> Tensor:
        return (self.schedule.sigma**2 + self.sigma_data**2).rsqrt()

    def _cos_and_sin(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        cos = self.sigma_data * self._c_in
        sin = self.schedule.sigma * self._c_in
        return process.gather(cos, t, like), process.gather(sin, t, like)


class Flow(Gaussian):
    """Flow matching: the net predicts the velocity eps - x_0 from z = (1 - u) x_0 + u eps, u = sigma / (1 + sigma).

    z is x_t rescaled; so this is v on the schedule `straight`, except for a scale and a skip from x_t. On other
    schedules only the times u differ.

    Source: Liu et al. 2022, Eq. 1; Esser et al. 2024, Eq. 13.
    """

    def _target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return eps - x_0

    def _input(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = self.schedule.alpha_bar
        return x_t / process.gather(alpha_bar.sqrt() + (1 - alpha_bar).sqrt(), t, x_t)

    def _read(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Denoised:
        z = self._input(x_t, t)
        sigma = self.schedule.sigma
        x_0_hat = z - process.gather(sigma / (1 + sigma), t, x_t) * prediction
        return Denoised(x_0_hat, eps_hat=z + process.gather(1 / (1 + sigma), t, x_t) * prediction)

    def _snr_per_x_0_error(self, snr: Tensor) -> Tensor:
        return flow_weight(snr)


def edm_weight(snr: Tensor, sigma_data: float) -> Tensor:
    """The weight of an error of x_0_hat in EDM's loss: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, Table 1."""
    return snr + sigma_data**-2


def flow_weight(snr: Tensor) -> Tensor:
    """The weight of an error of x_0_hat in flow matching's loss, 1 / u^2 with u = sigma / (1 + sigma)."""
    return (1 + snr.sqrt()) ** 2


@dataclass(frozen=True)
class UniformMix:
    """The course's baseline: mix with uniform noise and predict the clean image, without a timestep."""

    labels: LabelConditioning = LabelConditioning()

    def loss(
        self, model: Model, x_0: Tensor, label: Tensor | None, generator: Rng, progress: float = 1.0
    ) -> Loss:
        amount = generator.uniform([len(x_0)])
        u = 2 * generator.uniform(x_0.shape, x_0.dtype) - 1
        x_t = process.mix(x_0, amount, u)
        prediction = model(x_t, None, self.labels.for_training(label, generator)).to(x_0.dtype)
        error = per_image(prediction, x_0)
        return Loss(error.mean(), error.detach(), (4 * amount).long())

    def denoise(self, model: Model, x_t: Tensor, t: Tensor, label: Tensor | None) -> Denoised:
        """Read the prediction: `t` is the amount, and eps_hat is the u that amount and x_0_hat imply."""
        if not t.is_floating_point():
            raise ValueError(f"t is {t.dtype}; for UniformMix it is the amount, float [B] in [0, 1]")
        x_0_hat = model(x_t, None, self.labels.for_denoising(label, x_t)).to(x_t.dtype)
        amount = process.broadcast(t.to(x_t.dtype).clamp(min=SMALLEST_AMOUNT), x_t)
        return Denoised(x_0_hat, eps_hat=(x_t - (1 - amount) * x_0_hat) / amount)

    def corrupt(self, x_0: Tensor, level: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        amount = torch.full((len(x_0),), level, device=x_0.device)
        return process.mix(x_0, amount, noise), amount


LOG_SIGMA = {"log_normal": (-1.2, 1.2), "logit_normal": (0.0, 1.0)}
"""Mean and standard deviation of log sigma in training, by objective.timesteps. (On the straight path, whose time is
u = sigma / (1 + sigma), log sigma is the logit of u.) Karras et al. 2022, Table 1; Esser et al. 2024, Sec. 3.1."""


def gaussian(
    config: "ObjectiveConfig",
    schedule: Schedule,
    labels: LabelConditioning,
    prediction: type[Gaussian],
    x_0_max: float = 1.0,
) -> Gaussian:
    """The objective of the class `prediction` that `config` describes."""
    log_sigma = None
    if config.timesteps != "uniform":
        mean, std = LOG_SIGMA[config.timesteps]
        if config.log_sigma_mean is not None:
            mean = config.log_sigma_mean
        if config.log_sigma_std is not None:
            std = config.log_sigma_std
        log_sigma = (mean, std)
    return prediction(
        schedule=schedule,
        labels=labels,
        weighting=config.weight,
        min_snr_gamma=config.min_snr_gamma,
        learns_variance=config.variance == "learned",
        sigma_data=config.sigma_data,
        log_sigma=log_sigma,
        x_0_max=x_0_max,
    )


def per_image(prediction: Tensor, target: Tensor) -> Tensor:
    """[B], the mean squared error of each image."""
    if prediction.shape != target.shape:  # broadcasting would hide it
        got = tuple(prediction.shape)
        right = tuple(target.shape)
        raise ValueError(f"model returned shape {got}; it must return that of x_t, {right}")
    return (prediction - target).square().flatten(1).mean(1)
