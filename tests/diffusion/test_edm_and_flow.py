"""EDM and flow matching: parity with the formulas of their papers, in float64, written here as the papers have them."""

import math

import pytest
import torch
from scipy import stats
from support.exact_denoisers import normal

from ddpm.config.tree import ObjectiveConfig
from ddpm.diffusion import objectives, process, schedules
from ddpm.diffusion.objectives import Edm, Eps, Flow, LabelConditioning, V
from ddpm.diffusion.samplers import ddim, heun
from ddpm.diffusion.timesteps import karras, uniform
from ddpm.utils.generators import PhiloxGenerator

GEOMETRIC = schedules.geometric(1000, 0.002, 80.0)
STRAIGHT = schedules.straight(1000)
SHAPE = (16, 1, 4, 4)


class Net:
    """F(z, t) with a weight, that records its inputs."""

    def __init__(self):
        self.weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def __call__(self, z, t, label=None):
        self.z = z
        self.t = t
        return torch.tanh(self.weight * z + z.roll(1, 3)) + self.weight * t.view(-1, 1, 1, 1) / 1000


def edm_denoiser(net, x, sigma, t, sigma_data):
    """D(x; sigma), Karras et al. 2022, Eq. 7 and Table 1."""
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    c_in = 1 / (sigma**2 + sigma_data**2) ** 0.5
    return c_skip * x + c_out * net(c_in * x, t)


def loss_and_gradient(loss_of):
    net = Net()
    loss = loss_of(net)
    loss.backward()
    return loss.detach(), net.weight.grad


def drawn(objective):
    """What `objective.loss` draws from PhiloxGenerator(3): x_0, t, eps."""
    x_0 = 0.5 * normal(SHAPE, 1)()
    generator = PhiloxGenerator(3)
    return x_0, objective.draw_t(len(x_0), generator), generator.normal(SHAPE, torch.float64)


@pytest.mark.parametrize("schedule", [GEOMETRIC, schedules.cosine(1000)])
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_reads_its_net_as_the_denoiser_of_the_paper(schedule, sigma_data):
    t = torch.tensor([0, 1, 10, 100, 500, 700, 998, 999, *range(8)])
    sigma = schedule.sigma[t].view(-1, 1, 1, 1)
    x_t = normal(SHAPE)()
    net = Net()
    x = x_t * (1 + sigma**2) ** 0.5  # x_0 + sigma eps
    denoised = Edm(schedule, sigma_data=sigma_data).denoise(net, x_t, t, None)
    expected = edm_denoiser(net, x, sigma, t, sigma_data)
    torch.testing.assert_close(denoised.x_0_hat, expected, rtol=1e-9, atol=1e-9)
    x_t_again = process.q_sample(schedule.alpha_bar, denoised.x_0_hat, t, denoised.eps_hat)
    torch.testing.assert_close(x_t_again, x_t, rtol=1e-9, atol=1e-9)


def test_loss_and_gradient_of_edm_are_those_of_the_paper():
    """E lambda(sigma) |D(x_0 + sigma eps; sigma) - x_0|^2, Eq. 2 and Table 1."""
    objective = Edm(GEOMETRIC, log_sigma=(-1.2, 1.2), sigma_data=0.5)
    x_0, t, eps = drawn(objective)
    sigma = GEOMETRIC.sigma[t].view(-1, 1, 1, 1)

    def theirs(net):
        error = (edm_denoiser(net, x_0 + sigma * eps, sigma, t, 0.5) - x_0) ** 2
        return ((sigma**2 + 0.5**2) / (sigma * 0.5) ** 2 * error).mean()

    ours = loss_and_gradient(lambda net: objective.loss(net, x_0, None, PhiloxGenerator(3)).value)
    for a, b in zip(ours, loss_and_gradient(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=0)


def test_loss_and_gradient_of_flow_matching_are_those_of_the_paper():
    """E |net(z_u, t) - (eps - x_0)|^2, z_u = (1 - u) x_0 + u eps. Liu et al. 2022, Eq. 1."""
    objective = Flow(STRAIGHT, log_sigma=(0.0, 1.0))
    x_0, t, eps = drawn(objective)
    u = ((t + 1).double() / 1000).view(-1, 1, 1, 1)

    def theirs(net):
        return ((net((1 - u) * x_0 + u * eps, t) - (eps - x_0)) ** 2).mean()

    assert t.max() < 999  # whose beta is capped
    ours = loss_and_gradient(lambda net: objective.loss(net, x_0, None, PhiloxGenerator(3)).value)
    for a, b in zip(ours, loss_and_gradient(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=0)


def test_edm_is_minus_v_of_images_divided_by_sigma_data():
    """On the schedule whose sigma is sigma / sigma_data, with the same noise."""
    x_0 = 0.5 * normal(SHAPE, 1)()
    t = torch.arange(16) * 60
    eps = normal(SHAPE, 2)()
    divided = schedules.geometric(1000, 0.004, 160.0)
    target = Edm(GEOMETRIC, sigma_data=0.5)._target(x_0, t, eps)
    torch.testing.assert_close(target, -V(divided)._target(x_0 / 0.5, t, eps), rtol=1e-8, atol=1e-8)


def test_the_velocity_is_v_rescaled_plus_a_skip_from_x_t():
    """With r^2 = (1 - u)^2 + u^2: eps - x_0 = (v + (2 u - 1) x_t) / r."""
    x_0 = normal(SHAPE, 1)()
    t = torch.arange(16) * 60
    eps = normal(SHAPE, 2)()
    u = ((t + 1).double() / 1000).view(-1, 1, 1, 1)
    x_t = process.q_sample(STRAIGHT.alpha_bar, x_0, t, eps)
    v = V(STRAIGHT)._target(x_0, t, eps)
    r = ((1 - u) ** 2 + u**2) ** 0.5
    torch.testing.assert_close(eps - x_0, (v + (2 * u - 1) * x_t) / r, rtol=1e-9, atol=1e-9)


def test_ddim_on_the_straight_schedule_is_the_euler_method_of_flow_matching():
    """z_{u'} = z_u + (u' - u) net(z_u), to u' = 0."""
    timesteps = uniform(1000, 7)
    net = Net()
    u = (STRAIGHT.sigma / (1 + STRAIGHT.sigma)).tolist()
    start = normal(SHAPE)()
    z = start * ((1 - u[-1]) ** 2 + u[-1] ** 2) ** 0.5
    first, *_ = timesteps
    with torch.no_grad():
        for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
            step = (0.0 if after is None else u[after]) - u[t]
            z = z + step * net(z, torch.full((16,), t))
    x = ddim(denoiser(Flow(STRAIGHT), net), STRAIGHT, lambda: start, timesteps=timesteps, threshold=None)
    assert first == 999
    torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-9)


def test_heun_of_edm_is_that_of_the_paper():
    """Karras et al. 2022, Algorithm 1 with sigma(t) = t and s(t) = 1, from sigma_max to 0."""
    timesteps = karras(GEOMETRIC, 9)
    net = Net()
    sigmas = [*GEOMETRIC.sigma[timesteps].tolist(), 0.0]
    start = normal(SHAPE)()
    x = start * (1 + sigmas[0] ** 2) ** 0.5

    def slope(x, i):
        sigma = sigmas[i]
        t = torch.full((16,), timesteps[i])
        return (x - edm_denoiser(net, x, sigma, t, 0.5)) / sigma

    with torch.no_grad():
        for i in range(9):
            step = sigmas[i + 1] - sigmas[i]
            d = slope(x, i)
            euler = x + step * d
            x = euler if i == 8 else x + step * (d + slope(euler, i + 1)) / 2
    ours = heun(denoiser(Edm(GEOMETRIC), net), GEOMETRIC, lambda: start, timesteps=timesteps, threshold=None)
    torch.testing.assert_close(ours, x, rtol=1e-7, atol=1e-7)


def denoiser(objective, net):
    return lambda x_t, t: objective.denoise(net, x_t, t, None)


@pytest.mark.parametrize(
    ("changes", "schedule", "mean", "std"),
    [
        ({"timesteps": "log_normal"}, GEOMETRIC, -1.2, 1.2),
        ({"timesteps": "log_normal", "log_sigma_mean": 0.4}, GEOMETRIC, 0.4, 1.2),
        ({"timesteps": "log_normal", "log_sigma_std": 0.5}, schedules.cosine(1000), -1.2, 0.5),
        ({"timesteps": "logit_normal"}, STRAIGHT, 0.0, 1.0),
    ],
)
def test_sigma_is_log_normal_and_so_is_u_logit_normal(changes, schedule, mean, std):
    """Karras et al. 2022, Table 1: log sigma ~ N(mean, std^2). Esser et al. 2024: logit u ~ N(mean, std^2)."""
    objective = objectives.gaussian(ObjectiveConfig(**changes), schedule, LabelConditioning(), Eps)
    n = 20_000
    sigma = schedule.sigma[objective.draw_t(n, PhiloxGenerator(5))]
    u = sigma / (1 + sigma)
    logit = (u / (1 - u)).log().numpy()
    # Kolmogorov and Smirnov's 0.1 % bound, and half a step of the schedule, 0.005 in log sigma, at the densest place.
    assert stats.kstest(logit, stats.norm(mean, std).cdf).statistic < 1.95 / math.sqrt(n) + 0.005 / std


def test_sigma_beyond_the_schedule_is_its_first_or_last():
    t = objectives.Eps(GEOMETRIC, log_sigma=(0.0, 20.0)).draw_t(1000, PhiloxGenerator(0))
    assert (t.min(), t.max(), t.dtype) == (0, 999, torch.int64)
