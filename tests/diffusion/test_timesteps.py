"""Spacings against their formulas, and the chain between their timesteps against the one they skip."""

import math
from itertools import pairwise

import pytest
import torch
from support.exact_denoisers import denoiser_from_x_0

from ddpm.build import build_timesteps
from ddpm.config.tree import SampleConfig
from ddpm.diffusion import process, samplers, schedules, timesteps
from ddpm.diffusion.timesteps import karras, quadratic, respaced, uniform

LINEAR = schedules.linear(1000, 1e-4, 0.02)
COSINE = schedules.cosine(1000)
SPACINGS = {
    "uniform": lambda schedule, n: uniform(schedule.num_timesteps, n),
    "quadratic": lambda schedule, n: quadratic(schedule.num_timesteps, n),
    "karras": karras,
    "karras-1": lambda schedule, n: karras(schedule, n, rho=1.0),
    "karras-100": lambda schedule, n: karras(schedule, n, rho=100.0),
}


@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS.keys())
@pytest.mark.parametrize(
    "schedule",
    [*[schedules.cosine(T) for T in (1, 2, 3, 10, 1000)], LINEAR, schedules.sigmoid(1000)],
    ids="cosine-1 cosine-2 cosine-3 cosine-10 cosine linear sigmoid".split(),
)
def test_every_spacing_has_the_requested_number_of_steps_and_both_ends(spacing, schedule):
    T = schedule.num_timesteps
    for n in {1, 2, 3, 7, 20, 50, 333, 998, 999, 1000} & set(range(1, T + 1)):
        chosen = spacing(schedule, n)
        assert len(chosen) == n and all(type(t) is int for t in chosen)
        assert chosen[0] == T - 1 or schedule.sigma[chosen[0]] > 50
        assert n == 1 or chosen[-1] == 0
        assert all(a > b for a, b in pairwise(chosen))
        timesteps.check(chosen, T)


def test_known_answers():
    assert uniform(1000, 5) == [999, 749, 500, 250, 0]
    assert uniform(10, 4) == [9, 6, 3, 0]
    assert quadratic(101, 6) == [100, 64, 36, 16, 4, 0]
    assert quadratic(5, 4) == [4, 2, 1, 0]  # 4, 1.8, 0.4, 0: the two that round to 0 are 1 and 0
    assert quadratic(10, 1) == [9]


def test_uniform_steps_have_equal_strides():
    for n in (2, 3, 7, 50, 333, 999):
        strides = {a - b for a, b in pairwise(uniform(1000, n))}
        assert max(strides) - min(strides) <= 1


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_rounds_its_formula_to_the_nearest_timestep(rho):
    fine = schedules.linear(20_000, 5e-6, 1e-3)
    i = torch.arange(18, dtype=torch.float64)
    low = fine.sigma[0] ** (1 / rho)
    high = 80 ** (1 / rho)
    expected = (high + i / 17 * (low - high)) ** rho  # Karras et al. 2022, Eq. 5
    chosen = karras(fine, 18, rho)
    torch.testing.assert_close(fine.sigma[chosen], expected, rtol=0.02, atol=0)
    assert fine.sigma[chosen[0] - 1] < 80 <= fine.sigma[chosen[0]]
    for t, sigma in list(zip(chosen, expected.tolist(), strict=True))[1:]:
        distance = (fine.sigma.log() - torch.tensor(sigma).double().log()).abs()
        assert distance[t] == distance.min()


def test_karras_starts_at_sigma_max_or_at_the_end_of_the_schedule():
    assert karras(LINEAR, 5, sigma_max=float("inf"))[0] == 999
    assert karras(schedules.linear(100, 1e-4, 0.02), 5)[0] == 99  # its sigma ends at 1.3
    first = karras(COSINE, 5, sigma_max=30.0)[0]
    assert COSINE.sigma[first].item() == pytest.approx(30, rel=0.05)
    assert karras(COSINE, 5, sigma_max=700.0)[0] == 999  # of sigma 20,291, where 998 has 642
    exact = COSINE.sigma[990].item()
    assert karras(COSINE, 5, sigma_max=exact)[0] == 990


def test_karras_ends_at_sigma_min():
    chosen = karras(COSINE, 20, sigma_min=0.08)
    assert len(chosen) == 20 and COSINE.sigma[chosen[-1]].item() == pytest.approx(0.08, rel=0.02)
    assert karras(COSINE, 20, sigma_min=1e-4) == karras(COSINE, 20)  # the schedule's smallest is 0.0064


def test_karras_uses_neighbours_where_the_schedule_has_too_few_timesteps():
    """Between sigma 20,000 and 80 the cosine schedule has only 9 timesteps, for 16 of 30 steps."""
    chosen = karras(COSINE, 30, sigma_max=float("inf"))
    assert chosen[:16] == list(range(999, 983, -1)) and chosen[-1] == 0
    assert karras(COSINE, 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("chosen", [uniform(1000, 10), quadratic(1000, 25), [999], [700, 30, 29]], ids=len)
def test_the_chain_between_timesteps_has_their_alpha_bar_and_the_moments_of_the_jump(schedule, chosen):
    chain = respaced(schedule, chosen)
    rising = chosen[::-1]
    torch.testing.assert_close(chain.alpha_bar, schedule.alpha_bar[rising], rtol=1e-7, atol=0)
    for k, (t_before, t) in enumerate(pairwise(rising), start=1):
        # q(x_t | x_before) carried through every step that is skipped.
        signal = 1.0
        variance = 0.0
        for beta in schedule.beta[t_before + 1 : t + 1].tolist():
            signal = (1 - beta) ** 0.5 * signal
            variance = (1 - beta) * variance + beta
        assert chain.beta[k].item() == pytest.approx(variance, rel=1e-9)
        # Bayes: x_before ~ N(sqrt(a) x_0, 1 - a) a priori, and x_t seen through signal and variance.
        a = schedule.alpha_bar[t_before].item()
        x_0 = 0.3
        x_t = -1.1
        precision = 1 / (1 - a) + signal**2 / variance
        mean = (a**0.5 * x_0 / (1 - a) + signal * x_t / variance) / precision
        pixel = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        ours = process.posterior_mean(chain, x_0 * pixel, x_t * pixel, torch.tensor([k])).item()
        assert ours == pytest.approx(mean, rel=1e-8)
        assert chain.posterior_variance[k].item() == pytest.approx(1 / precision, rel=1e-8)


def test_the_chain_of_all_timesteps_is_the_schedule_itself():
    assert respaced(LINEAR, uniform(1000, 1000)) is LINEAR


def test_build():
    def built(schedule=LINEAR, num_dims=64, **changes):
        return build_timesteps(SampleConfig(**{"sampler": "ddim", **changes}), schedule, num_dims)

    assert built() == uniform(1000, 50)
    assert built(sampler="ddpm") == list(range(999, -1, -1))
    assert built(sampler="ddpm", num_sample_steps=10) == uniform(1000, 10)
    below = LINEAR.sigma[LINEAR.sigma < 80][-1].item()
    assert built(sampler="heun", num_sample_steps=10) == karras(LINEAR, 10, sigma_max=below)
    assert built(sampler="dpmpp_2m", num_sample_steps=10) == karras(LINEAR, 10)
    assert built(sampler="heun", num_sample_steps=10, spacing="uniform") == uniform(1000, 10)
    assert built(num_sample_steps=10, spacing="quadratic") == quadratic(1000, 10)
    assert built(num_sample_steps=10, spacing="karras", rho=3.0) == karras(LINEAR, 10, 3.0)
    assert built(sampler="dpmpp_2m", num_sample_steps=9, sigma_min=0.1) == karras(LINEAR, 9, sigma_min=0.1)
    short = schedules.linear(20, 1e-3, 0.2)
    assert built(short) == uniform(20, 20)


def test_karras_starts_where_noise_hides_the_mean_of_an_image():
    """At sigma = 10 sqrt(D): 80 for 8x8 grey images, 554 for 32x32 colour images, 1109 for 64x64."""

    def sigmas(num_dims, sampler="dpmpp_2m", schedule=COSINE):
        config = SampleConfig(sampler=sampler, num_sample_steps=20)
        return [round(s) for s in schedule.sigma[build_timesteps(config, schedule, num_dims)[:2]].tolist()]

    assert build_timesteps(SampleConfig(sampler="dpmpp_2m"), COSINE, 64) == karras(COSINE, 50)
    assert sigmas(64) == [80, 58] and sigmas(3 * 32**2) == [642, 321] and sigmas(3 * 64**2) == [20291, 642]
    # Heun's corrector uses the second eps_hat for the whole step, so it starts lower.
    assert sigmas(3 * 64**2, "heun") == [642, 321] and sigmas(3 * 32**2, "heun") == [321, 214]
    assert sigmas(3 * 32**2, "heun", schedules.sigmoid(1000))[0] == 58
    coarse = schedules.linear(5, 0.995, 0.996)  # it begins at 14, and 10 is wanted
    config = SampleConfig(sampler="heun", num_sample_steps=5)
    assert build_timesteps(config, coarse, 1) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("shape", "before"), [((1, 8, 8), 0.594), ((3, 32, 32), 0.558), ((3, 64, 64), 0.517)]
)
@pytest.mark.parametrize(("sampler", "tolerance"), [("dpmpp_2m", 0.01), ("heun", 0.011)])
def test_flat_images_keep_their_mean(shape, before, sampler, tolerance):
    """Data: flat images of one level from N(0.6, 0.1^2), so only the mean of all pixels carries information."""
    num_dims = math.prod(shape)

    def predict(x_t, alpha_bar):
        gain = alpha_bar.sqrt() * 0.1**2 / (alpha_bar * 0.1**2 + (1 - alpha_bar) / num_dims)
        return 0.6 + gain * (x_t.mean((1, 2, 3), keepdim=True) - alpha_bar.sqrt() * 0.6) + 0 * x_t

    def level(chosen):
        sample = getattr(samplers, sampler)
        # Everything is linear, so the image from zero noise is the mean of all images.
        x = sample(denoiser_from_x_0(COSINE, predict), COSINE, lambda: zero, timesteps=chosen, threshold=None)
        return x.mean().item()

    zero = torch.zeros(1, *shape, dtype=torch.float64)
    chosen = build_timesteps(SampleConfig(sampler=sampler, num_sample_steps=20), COSINE, num_dims)
    assert level(chosen) == pytest.approx(0.6, abs=tolerance)
    assert level(karras(COSINE, 20)) == pytest.approx(before, abs=0.002)  # from 80
