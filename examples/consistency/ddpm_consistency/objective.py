"""Consistency tuning (ECT): the objective.

Paper: Geng et al. 2024, Consistency Models Made Easy, arXiv:2406.14548

Axes: B batch, C channels, H W height and width, T timesteps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.config.tree import ObjectiveConfig
from ddpm.diffusion import objectives, process
from ddpm.diffusion.objectives import Denoised, Gaussian, LabelConditioning, Loss, Model, per_image
from ddpm.diffusion.rng import Rng
from ddpm.diffusion.schedules import Schedule

STAGES = 8
"""Stages of consistency tuning, each with half the distance between two noise levels of the one before."""
HUBER_C = 0.00054
"""c of the Pseudo-Huber distance per root of a dimension, for images in [-1, 1]."""


def consistency(
    config: ObjectiveConfig, schedule: Schedule, labels: LabelConditioning, prediction: type[Gaussian]
) -> "Consistency":
    """Consistency tuning of a net with this prediction."""
    if config.predict == "x_0":
        raise ValueError(
            "predict is 'x_0'; for consistency it must be eps, v, edm or flow: f(x, 0) must be x"
        )
    return Consistency(objectives.gaussian(config, schedule, labels, prediction))


@dataclass(frozen=True)
class Consistency:
    """Consistency tuning (ECT) of a trained net: x_0_hat becomes the same at all noise levels of an image.

    In x = x_t / sqrt(alpha_bar) = x_0 + sigma eps, x_0_hat is the paper's f(x, sigma), with f(x, 0) = x: c_skip is 1 at
    sigma = 0 for every prediction but x_0. The loss of a pair of levels s < sigma with one x_0, eps and dropout mask is

    d(f(x_0 + sigma eps, sigma), f(x_0 + s eps, s)) / (sigma - s),    d(a, b) = sqrt(|a - b|^2 + c^2) - c,

    without a gradient of the second f. Here d is divided by sqrt(D), so |.|^2 is the mean over the D numbers of an
    image, and c is 0.00054. s is the level nearest to sigma (1 - n / q^stage), n = 1 + k / (1 + e^(b sigma)), at least
    one timestep below; where that is not above 0, s is 0 and f(x, 0) = x_0. Training has STAGES of equal length.

    Source: Geng et al. 2024, Sec. 3; c: Song & Dhariwal 2023 (arXiv:2310.14189), Sec. 3.3.
    """

    prediction: Gaussian

    def loss(
        self, model: Model, x_0: Tensor, label: Tensor | None, generator: Rng, progress: float = 1.0
    ) -> Loss:
        of = self.prediction
        schedule = self.prediction.schedule
        t = of.draw_t(len(x_0), generator)
        eps = generator.normal(x_0.shape, x_0.dtype)
        label = of.labels.for_training(label, generator)
        r = self.lower(progress).to(t.device, non_blocking=True)[t]

        def f(t: Tensor) -> Tensor:
            return of.denoise(model, process.q_sample(schedule.alpha_bar, x_0, t, eps), t, label).x_0_hat

        with torch.no_grad():
            target = torch.where(process.broadcast(r < 0, x_0), x_0, f(r.clamp(min=0)))
        error = per_image(f(t), target)
        sigma = torch.cat([schedule.sigma, torch.zeros(1, dtype=torch.float64)])  # sigma[-1] is 0
        distance = (error + HUBER_C**2).sqrt() - HUBER_C
        gap = process.gather(sigma, t, error) - process.gather(sigma, r, error)
        return Loss((distance / gap).mean(), error.detach(), 4 * t // schedule.num_timesteps)

    def lower(self, progress: float) -> Tensor:
        """[T] int64: the timestep of the second level, for each t; -1 is the clean image."""
        sigma = self.prediction.schedule.sigma
        stage = min(int(STAGES * progress), STAGES - 1) + 1
        wanted = sigma * (1 - (1 + 8 * torch.sigmoid(-sigma)) / 2**stage)  # k = 8, b = 1, q = 2
        levels = torch.cat([torch.zeros(1, dtype=torch.float64), sigma])
        nearest = torch.bucketize(wanted, (levels[:-1] + levels[1:]) / 2) - 1
        return torch.minimum(nearest, torch.arange(len(sigma)) - 1)

    def denoise(self, model: Model, x_t: Tensor, t: Tensor, label: Tensor | None) -> Denoised:
        return self.prediction.denoise(model, x_t, t, label)

    def corrupt(self, x_0: Tensor, level: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.prediction.corrupt(x_0, level, noise)
