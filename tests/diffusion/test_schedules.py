"""Schedules against closed forms, diffusers, and one another."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm.build import build_schedule
from ddpm.config.tree import ScheduleConfig
from ddpm.diffusion import schedules

ALL = {
    "linear": schedules.linear(1000, 1e-4, 0.02),
    "scaled_linear": schedules.scaled_linear(1000, 0.00085, 0.012),
    "cosine": schedules.cosine(1000),
    "sigmoid": schedules.sigmoid(1000),
    "straight": schedules.straight(1000),
    "geometric": schedules.geometric(1000, 0.002, 80.0),
}


@pytest.mark.parametrize("num_timesteps", [10, 1000])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda T: schedules.linear(T, 1e-4, 0.02), {"beta_schedule": "linear"}),
        (lambda T: schedules.scaled_linear(T, 1e-4, 0.02), {"beta_schedule": "scaled_linear"}),
        (lambda T: schedules.cosine(T), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_beta_equals_that_of_diffusers(ours, theirs, num_timesteps):
    expected = DDPMScheduler(num_train_timesteps=num_timesteps, **theirs)
    schedule = ours(num_timesteps)
    # diffusers computes the linear ones in float32.
    torch.testing.assert_close(schedule.beta.float(), expected.betas, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(schedule.alpha_bar.float(), expected.alphas_cumprod, rtol=1e-4, atol=1e-9)


def test_cosine_follows_its_closed_form_and_caps_the_last_beta():
    schedule = schedules.cosine(1000, cosine_s=0.008, max_beta=0.999)
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    curve = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(schedule.alpha_bar[:-1], curve[:-1], rtol=1e-9, atol=0)
    assert schedule.beta[-1] == 0.999
    assert 1 / schedule.alpha[-1].sqrt() == pytest.approx(31.6, abs=0.05)


@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.7), (-3.0, 3.0, 0.3)])
def test_sigmoid_follows_its_closed_form(start, end, tau):
    schedule = schedules.sigmoid(200, start, end, tau)
    u = torch.arange(1, 201, dtype=torch.float64) / 200
    v_start, v_end = (torch.tensor(x / tau, dtype=torch.float64).sigmoid() for x in (start, end))
    curve = (v_end - ((u * (end - start) + start) / tau).sigmoid()) / (v_end - v_start)
    torch.testing.assert_close(schedule.alpha_bar[:-1], curve[:-1], rtol=1e-7, atol=0)
    assert schedule.beta[-1] == 0.999


def test_straight_is_the_path_of_flow_matching_at_unit_variance():
    schedule = schedules.straight(1000)
    u = torch.arange(1, 1000, dtype=torch.float64) / 1000
    torch.testing.assert_close(schedule.sigma[:-1], u / (1 - u), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        schedule.alpha_bar[:-1], (1 - u) ** 2 / ((1 - u) ** 2 + u**2), rtol=1e-9, atol=0
    )
    assert schedule.beta[-1] == 0.999


def test_the_c_noise_of_edm_is_linear_in_t_on_the_geometric_schedule():
    c_noise = schedules.geometric(1000, 0.002, 80.0).sigma.log() / 4
    expected = torch.linspace(math.log(0.002) / 4, math.log(80) / 4, 1000, dtype=torch.float64)
    torch.testing.assert_close(c_noise, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())
def test_tables_are_consistent(schedule):
    T = schedule.num_timesteps
    tables = ["alpha", "alpha_bar", "alpha_bar_prev", "snr", "log_snr", "sigma", "posterior_variance"]
    for name in ["beta", *tables]:
        table = getattr(schedule, name)
        assert table.dtype == torch.float64 and table.shape == (T,) and table.isfinite().all(), name
    product = 1.0
    for t in range(T):
        assert schedule.alpha_bar_prev[t].item() == pytest.approx(product, rel=1e-12)
        product *= 1 - schedule.beta[t].item()
        assert schedule.alpha_bar[t].item() == pytest.approx(product, rel=1e-12)
    torch.testing.assert_close(schedule.snr, schedule.sigma**-2)
    torch.testing.assert_close(schedule.log_snr, -2 * schedule.sigma.log())
    assert (schedule.alpha_bar.diff() < 0).all() and (schedule.sigma.diff() > 0).all()
    assert schedule.posterior_variance[0] == 0
    assert (schedule.posterior_variance[1:] > 0).all()
    assert (schedule.posterior_variance < schedule.beta).all()
    # The precision of q(x_{t-1} | x_t, x_0) is that of q(x_{t-1} | x_0) plus what x_t tells (Bayes).
    s = schedule
    after = slice(1, None)
    precision = 1 / (1 - s.alpha_bar_prev[after]) + s.alpha[after] / s.beta[after]
    torch.testing.assert_close(1 / s.posterior_variance[after], precision, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ALL)
def test_build(kind):
    config = ScheduleConfig(
        kind=kind, num_timesteps=50, beta_end=0.03, cosine_s=0.01, sigmoid_tau=0.9, sigma_min=0.01
    )
    expected = {
        "linear": schedules.linear(50, 1e-4, 0.03),
        "scaled_linear": schedules.scaled_linear(50, 1e-4, 0.03),
        "cosine": schedules.cosine(50, 0.01, 0.999),
        "sigmoid": schedules.sigmoid(50, -3, 3, 0.9, 0.999),
        "straight": schedules.straight(50, 0.999),
        "geometric": schedules.geometric(50, 0.01, 80.0),
    }[kind]
    torch.testing.assert_close(build_schedule(config).beta, expected.beta, rtol=0, atol=0)


def test_a_schedule_may_have_one_timestep():
    assert schedules.linear(1, 0.5, 0.5).alpha_bar.tolist() == [0.5]
    assert schedules.cosine(1).alpha_bar.tolist() == pytest.approx([0.001])
