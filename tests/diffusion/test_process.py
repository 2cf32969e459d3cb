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
    signal, variance = 1.0, 0.0
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for step, beta in enumerate(schedule.beta.tolist()):
        signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
        t = torch.tensor([step])
        assert process.q_sample(schedule.alpha_bar, one, t, zero).item() == pytest.approx(signal, rel=1e-9)
        noise = process.q_sample(schedule.alpha_bar, zero, t, one).item()
        assert noise**2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_q_sample_equals_that_of_diffusers(shape):
    schedule = SCHEDULES[0]
    x_0, eps, g = draw(shape, dtype=torch.float32)
    t = torch.randint(1000, shape[:1], generator=g)
    expected = DDPMScheduler(num_train_timesteps=1000).add_noise(x_0, eps, t)
    x_t = process.q_sample(schedule.alpha_bar, x_0, t, eps)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-5)


def test_each_image_has_its_own_timestep():
    schedule = SCHEDULES[0]
    x_0, eps, _ = draw((4, 1, 2, 2))
    t = torch.tensor([0, 10, 500, 999])
    together = process.q_sample(schedule.alpha_bar, x_0, t, eps)
    for i in range(4):
        alone = process.q_sample(schedule.alpha_bar, x_0[i : i + 1], t[i : i + 1], eps[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=0)


def test_float32_noise_is_exact_at_the_first_timestep():
    """1 - alpha_bar = 1e-4 subtracted in float32 would be off by 3e-4 of itself."""
    schedule = SCHEDULES[0]
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    x_t = process.q_sample(schedule.alpha_bar, zero, torch.tensor([0]), one)
    assert x_t.item() == pytest.approx(0.01, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rejected(dtype):
    x = torch.zeros(1, 1, 2, 2, dtype=dtype)
    with pytest.raises(ValueError, match="needs float32 or float64"):
        process.q_sample(SCHEDULES[0].alpha_bar, x, torch.tensor([0]), x)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_eps_x_0_and_v_convert_to_each_other(schedule, shape):
    x_0, eps, g = draw(shape)
    t = torch.randint(schedule.num_timesteps, shape[:1], generator=g)
    t[0] = 0
    alpha_bar = schedule.alpha_bar
    x_t = process.q_sample(alpha_bar, x_0, t, eps)
    v = process.v_from(alpha_bar, x_0, t, eps)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(process.predict_x_0_from_eps(alpha_bar, x_t, t, eps), x_0, **close)
    torch.testing.assert_close(process.predict_eps_from_x_0(alpha_bar, x_t, t, x_0), eps, **close)
    torch.testing.assert_close(process.predict_x_0_from_v(alpha_bar, x_t, t, v), x_0, **close)
    torch.testing.assert_close(process.predict_eps_from_v(alpha_bar, x_t, t, v), eps, **close)


def test_v_equals_that_of_diffusers():
    x_0, eps, g = draw((4, 3, 4, 4), dtype=torch.float32)
    t = torch.randint(1000, (4,), generator=g)
    expected = DDPMScheduler(num_train_timesteps=1000).get_velocity(x_0, eps, t)
    v = process.v_from(SCHEDULES[0].alpha_bar, x_0, t, eps)
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_mean_follows_bayes_rule(schedule):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_{t-1} | x_0) q(x_t | x_{t-1}): add precisions."""
    x_0, x_t, _ = draw((6, 1, 2, 2))
    T = schedule.num_timesteps
    t = torch.tensor([1, 2, 5, T // 2, T - 2, T - 1])
    beta, alpha, previous = (
        table[t].view(-1, 1, 1, 1) for table in (schedule.beta, schedule.alpha, schedule.alpha_bar_prev)
    )
    prior, data = 1 / (1 - previous), alpha / beta
    expected = (prior * previous.sqrt() * x_0 + data * x_t / alpha.sqrt()) / (prior + data)
    torch.testing.assert_close(process.posterior_mean(schedule, x_0, x_t, t), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_mean_at_the_last_step_is_x_0(schedule):
    x_0, x_t, _ = draw((3, 1, 2, 2))
    t = torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(process.posterior_mean(schedule, x_0, x_t, t), x_0, rtol=1e-12, atol=0)


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a, x, t: process.q_sample(a, x, t, x[:1]), r"eps has shape \(1, 1, 2, 2\); .* x_0"),
        (lambda a, x, t: process.v_from(a, x, t, x[:, :, :1]), "eps has shape"),
        (lambda a, x, t: process.predict_x_0_from_v(a, x, t, x[:1]), "v has shape"),
        (lambda a, x, t: process.mix(x, torch.ones(2), x[:1]), "u has shape"),
        (lambda a, x, t: process.posterior_mean(SCHEDULES[0], x[:1], x, t), "x_0 has shape"),
        (lambda a, x, t: process.q_sample(a, x, t[:1], x), r"t is torch.int64 \(1,\); .* \(2,\)"),
        (lambda a, x, t: process.q_sample(a, x, t.float(), x), "t is torch.float32"),
    ],
)
def test_invalid_arguments_are_errors(make, message):
    x, t = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        make(SCHEDULES[0].alpha_bar, x, t)
