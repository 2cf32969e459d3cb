"""The forward process against its step-by-step chain, Bayes' rule and diffusers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm.diffusion import process, schedules

SCHEDULES = [schedules.linear(1000, 1e-4, 0.02), schedules.cosine(1000), schedules.sigmoid(40)]
SHAPES = [(5, 1, 8, 8), (2, 3, 4, 6), (1, 1, 1, 1)]


def draw(shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x_0 = 2 * torch.rand(shape, generator=g, dtype=dtype) - 1
    eps = torch.randn(shape, generator=g, dtype=dtype)
    return x_0, eps, g


def test_q_sample_is_the_chain_in_one_jump():
    """Moments of x_t, carried through q(x_t | x_{t-1}) one step at a time."""
    schedule = SCHEDULES[0]
    signal = 1.0
    variance = 0.0
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for step, beta in enumerate(schedule.beta.tolist()):
        signal = math.sqrt(1 - beta) * signal
        variance = (1 - beta) * variance + beta
        t = torch.tensor([step])
        assert process.q_sample(schedule.alpha_bar, one, t, zero).item() == pytest.approx(signal, rel=1e-9)
        noise = process.q_sample(schedule.alpha_bar, zero, t, one).item()
        assert noise**2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_x_t_and_v_equal_those_of_diffusers(shape):
    alpha_bar = SCHEDULES[0].alpha_bar
    theirs = DDPMScheduler(num_train_timesteps=1000)
    x_0, eps, g = draw(shape, dtype=torch.float32)
    t = torch.randint(1000, shape[:1], generator=g)
    ours = process.q_sample(alpha_bar, x_0, t, eps), process.v_from(alpha_bar, x_0, t, eps)
    expected = theirs.add_noise(x_0, eps, t), theirs.get_velocity(x_0, eps, t)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_float32_noise_is_exact_at_the_first_timestep():
    """1 - alpha_bar = 1e-4 subtracted in float32 would be off by 3e-4 of itself."""
    schedule = SCHEDULES[0]
    zero = torch.zeros(1, 1, 1, 1)
    one = torch.ones(1, 1, 1, 1)
    x_t = process.q_sample(schedule.alpha_bar, zero, torch.tensor([0]), one)
    assert x_t.item() == pytest.approx(0.01, rel=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_mean_follows_bayes_rule(schedule):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_{t-1} | x_0) q(x_t | x_{t-1}): add precisions; x_0 at t = 0."""
    x_0, x_t, _ = draw((6, 1, 2, 2))
    T = schedule.num_timesteps
    t = torch.tensor([1, 2, 5, T // 2, T - 2, T - 1])
    tables = (schedule.beta, schedule.alpha, schedule.alpha_bar_prev)
    beta, alpha, previous = (table[t].view(-1, 1, 1, 1) for table in tables)
    prior = 1 / (1 - previous)
    data = alpha / beta
    expected = (prior * previous.sqrt() * x_0 + data * x_t / alpha.sqrt()) / (prior + data)
    torch.testing.assert_close(process.posterior_mean(schedule, x_0, x_t, t), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(process.posterior_mean(schedule, x_0, x_t, 0 * t), x_0, rtol=1e-12, atol=0)


def test_mix_equals_corrupt_of_the_course():
    x_0, _, g = draw((4, 1, 3, 3))
    u = 2 * torch.rand(x_0.shape, generator=g, dtype=x_0.dtype) - 1
    amount = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    x_t = process.mix(x_0, amount, u)
    torch.testing.assert_close(x_t[0], x_0[0], rtol=0, atol=0)
    torch.testing.assert_close(x_t[3], u[3], rtol=0, atol=0)
    assert x_t.abs().max() <= 1
    # In [0, 1], as the course has it, and back.
    a = amount.view(-1, 1, 1, 1)
    course = (1 - a) * (x_0 + 1) / 2 + a * (u + 1) / 2
    torch.testing.assert_close(x_t, 2 * course - 1)
