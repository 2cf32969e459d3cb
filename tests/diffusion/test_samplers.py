"""Samplers on problems with known answers, and step for step against diffusers."""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_dpmsolver_multistep
from support.exact_denoisers import (
    ancestral,
    black_and_white,
    finite,
    gaussian,
    normal,
    toy_denoiser,
    visited,
)

from ddpm import build
from ddpm.config import kinds
from ddpm.config.tree import SampleConfig
from ddpm.diffusion import process, schedules
from ddpm.diffusion.guidance import clip
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.samplers import PerImageNoise, ddim, dpmpp_2m, heun, mix
from ddpm.diffusion.timesteps import karras, quadratic, uniform
from ddpm.utils.generators import PhiloxGenerator

LINEAR = schedules.linear(1000, 1e-4, 0.02)
COSINE = schedules.cosine(1000)
SHORT = schedules.linear(100, 1e-3, 0.2)
TOY = toy_denoiser(SHORT)
TEN = uniform(100, 10)
ALL = {
    "ddpm": partial(ancestral, timesteps=TEN),
    "ancestral-beta": partial(ancestral, timesteps=TEN, variance="beta"),
    "ddim": partial(ddim, timesteps=TEN),
    "ddim-eta": partial(ddim, timesteps=TEN, eta=0.5),
    "dpmpp_2m": partial(dpmpp_2m, timesteps=TEN),
    "dpmpp_2m-eta": partial(dpmpp_2m, timesteps=TEN, eta=0.5),
    "heun": partial(heun, timesteps=TEN),
}
"""Every sampler with a schedule, in ten steps of SHORT."""
RANDOM = {"ddpm", "ancestral-beta", "ddim-eta", "dpmpp_2m-eta"}


def mix_in_four_steps(denoise, schedule, noise, **settings):
    return mix(denoise, noise, num_sample_steps=4, **settings)


each_sampler = pytest.mark.parametrize("sample", ALL.values(), ids=ALL.keys())
each_threshold = pytest.mark.parametrize("threshold", [clip, None], ids=["clipped", "plain"])
assert_close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("schedule", "sample"),
    [
        *[(s, partial(ancestral, variance=v)) for s in (LINEAR, COSINE) for v in ("beta", "beta_tilde")],
        *[(LINEAR, partial(ddim, timesteps=uniform(1000, 500), eta=eta)) for eta in (0.0, 0.5, 1.0)],
        *[(LINEAR, partial(dpmpp_2m, timesteps=karras(LINEAR, 100), eta=eta)) for eta in (0.0, 0.5, 1.0)],
    ],
)
@each_threshold
def test_the_moments_of_gaussian_data_are_reached(schedule, sample, threshold):
    noise = normal((100, 1, 10, 20))  # 20,000 pixels: the mean is known to 0.0014, the std to 0.001
    x = sample(gaussian(schedule, -0.3, 0.2), schedule, noise, threshold=threshold)
    assert x.mean().item() == pytest.approx(-0.3, abs=0.006)
    assert x.std().item() == pytest.approx(0.2, rel=0.04)


@pytest.mark.parametrize(
    ("sample", "order"),
    [
        (ddim, 1),
        (partial(ddim, eta=1.0), 1),
        (dpmpp_2m, 2),
        (partial(dpmpp_2m, eta=0.5), 2),
        (partial(dpmpp_2m, eta=1.0), 2),
        (heun, 2),
    ],
    ids="ddim ddim-eta-1 dpmpp_2m dpmpp_2m-eta-0.5 dpmpp_2m-eta-1 heun".split(),
)
def test_convergence_has_the_documented_order(sample, order):
    """Halving the steps divides the error by 2^order.

    Data from N(0, s^2): everything is linear, so an image is a sum of the noise draws, each times its own factor.
    Image k is the contribution of draw k alone, and the root of the sum of squares is the std of images. In
    y = x_t / sqrt(alpha_bar) the std of x_t is sqrt(s^2 + sigma^2) for any eta; the last step, which is the same for
    every number of steps, returns x_0_hat = s^2 / (s^2 + sigma^2) y.
    """
    s = 0.2
    # T far above the number of steps: rounding to whole t has no effect.
    fine = schedules.linear(25_601, 2.5e-6, 8e-4)
    spread = (s**2 + fine.sigma**2).sqrt()
    denoise = gaussian(fine, 0.0, s)
    error = []
    for n in (50, 100, 200, 400):
        timesteps = karras(fine, n + 1)
        draws = torch.eye(n + 1, dtype=torch.float64).view(n + 1, n + 1, 1, 1, 1)
        draws[0] *= spread[timesteps[0]] * fine.alpha_bar[timesteps[0]].sqrt()  # data that are not N(0, 1)
        x = sample(denoise, fine, iter(draws).__next__, timesteps=timesteps, threshold=None)
        error.append(abs(x.norm().item() / (s**2 / spread[0].item()) - 1))
    assert error[-1] < {1: 0.02, 2: 4e-4}[order]
    orders = [math.log2(coarse / finer) for coarse, finer in pairwise(error)]
    assert orders == pytest.approx([order] * 3, abs=0.15)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize(
    "sample",
    [
        partial(ancestral),
        partial(ancestral, variance="beta"),
        partial(ancestral, timesteps=quadratic(1000, 50)),
        partial(ddim, timesteps=uniform(1000, 50)),
        partial(ddim, timesteps=uniform(1000, 50), eta=1.0),
        partial(dpmpp_2m, timesteps=uniform(1000, 20)),
        partial(dpmpp_2m, timesteps="karras"),
        partial(dpmpp_2m, timesteps="karras", eta=1.0),
        partial(heun, timesteps="karras"),
    ],
    ids="ancestral beta quadratic ddim ddim-eta-1 dpmpp_2m dpmpp_2m-karras dpmpp_2m-eta-1 heun-karras".split(),
)
def test_samples_of_a_finite_data_set_are_its_points(sample, schedule):
    if sample.keywords.get("timesteps") == "karras":
        sample = partial(sample, timesteps=karras(schedule, 20))
    points = black_and_white()
    x = sample(finite(schedule, points), schedule, normal((200, 1, 4, 4)))
    nearest = (x[:, None] - points).flatten(2).norm(dim=2).min(1)
    assert nearest.values.max() < 1e-3
    assert torch.bincount(nearest.indices, minlength=4).tolist() == pytest.approx([50] * 4, abs=31)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@each_threshold
def test_ancestral_equals_diffusers_step_for_step(threshold, variance):
    kind = {"beta": "fixed_large", "beta_tilde": "fixed_small"}[variance]
    theirs = DDPMScheduler(num_train_timesteps=100, clip_sample=threshold is clip, variance_type=kind)
    theirs.alphas_cumprod = SHORT.alpha_bar  # ours, in float64
    theirs.one = torch.ones((), dtype=torch.float64)
    shape = (3, 2, 4, 4)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    expected = [x]
    for t in theirs.timesteps:
        x = theirs.step(TOY(x, t.expand(3)).eps_hat, int(t), x, generator=g).prev_sample
        expected.append(x)
    settings = {"threshold": threshold, "variance": variance}
    assert_close(visited(ancestral, TOY, SHORT, normal(shape), **settings), expected)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@each_threshold
@pytest.mark.parametrize("num_sample_steps", [12, 100])
def test_ddim_equals_diffusers_step_for_step(num_sample_steps, threshold, eta):
    shape = (3, 2, 4, 4)
    timesteps = uniform(100, num_sample_steps)
    theirs = DDIMScheduler(num_train_timesteps=100, clip_sample=threshold is clip)
    theirs.alphas_cumprod = SHORT.alpha_bar
    theirs.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(100 // (timesteps[0] - timesteps[1]))
    step = partial(theirs.step, eta=eta, use_clipped_model_output=threshold is clip)
    noise = normal(shape)
    x = noise()
    expected = [x]
    for t in timesteps:
        z = noise() if eta > 0 and t > 0 else torch.zeros(shape, dtype=torch.float64)
        x = step(TOY(x, torch.full((3,), t)).eps_hat, t, x, variance_noise=z).prev_sample
        expected.append(x)
    settings = {"timesteps": timesteps, "eta": eta, "threshold": threshold}
    assert_close(visited(ddim, TOY, SHORT, normal(shape), **settings), expected)


@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
@each_threshold
@pytest.mark.parametrize(("num_timesteps", "num_sample_steps"), [(100, 12), (100, 20), (1000, 20)])
def test_dpmpp_2m_equals_diffusers_step_for_step(
    num_timesteps, num_sample_steps, threshold, eta, algorithm, monkeypatch
):
    """With more than 15 steps diffusers' last step has order 1 only because sigma is 0 there, as in ours."""
    schedule = schedules.linear(num_timesteps, 1e-3, 20 / num_timesteps)
    shape = (3, 2, 4, 4)
    net = toy_denoiser(schedule)
    timesteps = karras(schedule, num_sample_steps)
    theirs = DPMSolverMultistepScheduler(
        num_train_timesteps=num_timesteps, thresholding=threshold is clip, algorithm_type=algorithm
    )
    # diffusers rounds every x_t to float32, whatever the input.
    in_float64 = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", in_float64)
    # Our steps, in float64; its dynamic threshold is at most sample_max_value = 1, so that it clips.
    theirs.num_inference_steps = num_sample_steps
    theirs.timesteps = torch.tensor(timesteps)
    theirs.sigmas = torch.cat([schedule.sigma[timesteps], torch.zeros(1, dtype=torch.float64)])
    noise = normal(shape)
    x = noise()
    expected = [x]
    for t in timesteps:
        z = noise() if eta > 0 and t > 0 else torch.zeros(shape, dtype=torch.float64)
        x = theirs.step(net(x, torch.full((3,), t)).eps_hat, t, x, variance_noise=z).prev_sample
        expected.append(x)
    settings = {"timesteps": timesteps, "eta": eta, "threshold": threshold}
    assert_close(visited(dpmpp_2m, net, schedule, normal(shape), **settings), expected)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta_sets_how_much_noise_dpmpp_2m_replaces(eta):
    """Data that are one point: x_t follows q(x_t | x_0) exactly, and e^-(eta h) of its noise is the previous step's."""
    timesteps = karras(SHORT, 8)
    noise = normal((200, 1, 20, 20))
    *seen, _ = visited(dpmpp_2m, gaussian(SHORT, 0.7, 0.0), SHORT, noise, timesteps=timesteps, eta=eta)
    alpha_bar = SHORT.alpha_bar[timesteps]
    sigma = SHORT.sigma[timesteps]
    eps = [(x - a.sqrt() * 0.7) / (1 - a).sqrt() for x, a in zip(seen, alpha_bar, strict=True)]
    assert [e.mean().item() for e in eps] == pytest.approx([0] * 8, abs=0.02)
    assert [e.var().item() for e in eps] == pytest.approx([1] * 8, rel=0.03)
    kept = [(a * b).mean().item() for a, b in pairwise(eps)]
    assert kept == pytest.approx(((sigma[1:] / sigma[:-1]) ** eta).tolist(), abs=0.02)


def test_heun_is_algorithm_1_line_by_line():
    """Karras et al. 2022, with D(y, sigma) = x_0_hat, and their s(t) = 1."""
    timesteps = karras(SHORT, 8)
    shape = (3, 2, 4, 4)
    level = {float(SHORT.sigma[t]): t for t in timesteps}

    def D(y, sigma):  # noqa: N802
        t = torch.full((3,), level[sigma])
        return TOY(y * SHORT.alpha_bar[level[sigma]].sqrt(), t).x_0_hat.clamp(-1, 1)

    y = normal(shape)() / SHORT.alpha_bar[timesteps[0]].sqrt()
    for sigma, sigma_next in pairwise([*level, 0.0]):
        d = (y - D(y, sigma)) / sigma
        y_next = y + (sigma_next - sigma) * d
        if sigma_next != 0:
            d_next = (y_next - D(y_next, sigma_next)) / sigma_next
            y_next = y + (sigma_next - sigma) * (d / 2 + d_next / 2)
        y = y_next
    assert_close(heun(TOY, SHORT, normal(shape), timesteps=timesteps), y)


@pytest.mark.parametrize("timesteps", [uniform(100, 100), uniform(100, 10), quadratic(100, 7), [40]])
def test_ddim_with_eta_one_is_ancestral(timesteps):
    denoise = gaussian(SHORT, 0.3, 0.2)
    shape = (2, 1, 4, 4)
    ours = ddim(denoise, SHORT, normal(shape), timesteps=timesteps, eta=1.0)
    assert_close(ours, ancestral(denoise, SHORT, normal(shape), timesteps=timesteps))


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@each_threshold
def test_ancestral_on_all_steps_is_algorithm_2_bit_for_bit(threshold, variance):
    shape = (2, 1, 4, 4)
    s = SHORT
    variances = s.beta if variance == "beta" else s.posterior_variance
    noise = normal(shape, dtype=torch.float32)
    x = noise()
    for t in reversed(range(100)):
        x_0_hat, eps_hat, _ = TOY(x, torch.full((2,), t))
        if threshold:
            x = process.posterior_mean(s, x_0_hat.clamp(-1, 1), x, torch.full((2,), t))
        else:
            beta, alpha, alpha_bar = (float(a[t]) for a in (s.beta, s.alpha, s.alpha_bar))
            x = (x - beta / (1 - alpha_bar) ** 0.5 * eps_hat) / alpha**0.5
        if t > 0:
            x = x + float(variances[t]) ** 0.5 * noise()
    noise = normal(shape, dtype=torch.float32)
    assert torch.equal(ancestral(TOY, s, noise, variance=variance, threshold=threshold), x)


@pytest.mark.parametrize(
    ("sample", "num_steps", "is_random"),
    [(ancestral, 100, True), *[(sample, 10, name in RANDOM) for name, sample in ALL.items()]],
    ids=["all", *ALL],
)
def test_noise_and_steps_of_a_sampler(sample, num_steps, is_random):
    """Noise is drawn for x_T and, by a random sampler, at every step but the last, which returns x_0_hat at t = 0.

    on_step sees the input and the prediction of every step; no graph is built.
    """
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    asked = []
    seen = []
    draws = normal((num_steps + 1, 2, 1, 4, 4))()
    left = iter(draws)

    def denoise(x_t, t):
        asked.append(t)
        return Denoised(*(weight * a for a in gaussian(SHORT, 0.3, 0.2)(x_t, t)[:2]))

    x = sample(denoise, SHORT, left.__next__, on_step=lambda *step: seen.append(step))
    assert len(list(left)) == (1 if is_random else num_steps)
    assert asked[-1].tolist() == [0, 0]  # the first timestep is sampled
    assert [step for step, _, _ in seen] == list(range(num_steps))
    assert torch.equal(seen[0][1], draws[0])
    torch.testing.assert_close(seen[-1][2], x, rtol=1e-12, atol=0)
    assert not x.requires_grad


def generators(seeds):
    return [PhiloxGenerator(seed) for seed in seeds]


@each_sampler
def test_an_image_depends_only_on_its_seed(sample):
    denoise = gaussian(SHORT, 0.3, 0.2)
    shape = (3, 4, 4)
    x = sample(denoise, SHORT, PerImageNoise(generators(range(10, 16)), shape))
    alone = sample(denoise, SHORT, PerImageNoise(generators([13]), shape))
    reordered = sample(denoise, SHORT, PerImageNoise(generators([15, 13, 10]), shape))
    assert torch.equal(x[3:4], alone)
    assert torch.equal(x[[5, 3, 0]], reordered)
    assert not torch.equal(x[0], x[1])


def test_per_image_noise():
    noise = PerImageNoise(generators(range(50)), (3, 8, 8))
    first = noise()
    second = noise()
    assert first.shape == (50, 3, 8, 8) and first.dtype == torch.float32
    assert first.mean().item() == pytest.approx(0, abs=0.05)
    assert first.std().item() == pytest.approx(1, abs=0.05)
    correlation = torch.corrcoef(torch.cat([first, second]).flatten(1))
    assert (correlation - torch.eye(100)).abs().max() < 6 / 192**0.5
    u = PerImageNoise(generators(range(50)), (3, 8, 8), uniform=True)()
    assert -1 <= u.min() < -0.99 and 0.99 < u.max() < 1
    assert u.square().mean().item() == pytest.approx(1 / 3, abs=0.02)


def test_cosine_stays_bounded_when_clipped_and_explodes_when_not():
    """A useless net: the first step without clipping multiplies its error by 31.6."""

    def denoise(x_t, t):
        eps_hat = torch.ones_like(x_t)
        return Denoised(process.predict_x_0_from_eps(COSINE.alpha_bar, x_t, t, eps_hat), eps_hat)

    def largest(threshold):
        return [x.abs().max() for x in visited(ancestral, denoise, COSINE, noise, threshold=threshold)]

    noise = normal((4, 1, 4, 4))
    *seen, clipped = largest(clip)
    assert max(seen) < 6 and clipped <= 1
    assert largest(None)[-1] > 30
    assert ddim(denoise, COSINE, noise, timesteps=uniform(1000, 50)).abs().max() <= 1


def test_mix_equals_the_loop_of_the_course():
    g = torch.Generator().manual_seed(0)
    u = 2 * torch.rand((4, 1, 5, 5), generator=g, dtype=torch.float64) - 1
    amounts = []

    def net(x):
        return torch.tanh(x.roll(1, 2) + 0.3)

    def denoise(x_t, amount):
        amounts.append(amount[0].item())
        return Denoised(net(x_t), x_t)

    x = u
    n = 5
    expected = [x]
    for i in range(n):
        factor = 1 / (n - i)
        x = x * (1 - factor) + net(x) * factor
        expected.append(x)
    torch.testing.assert_close(visited(mix, denoise, lambda: u, num_sample_steps=n), expected)
    assert amounts == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(("threshold", "expected"), [(clip, 1), (lambda x: x / 2, 1.5)])
@pytest.mark.parametrize("sample", [*ALL.values(), mix_in_four_steps], ids=[*ALL, "mix"])
def test_the_sampler_uses_the_threshold(sample, threshold, expected):
    """A net that always predicts 3."""
    seen = []
    x = sample(
        lambda x_t, t: Denoised(torch.full_like(x_t, 3.0), x_t),
        SHORT,
        normal((2, 1, 2, 2)),
        threshold=threshold,
        on_step=lambda step, x_t, x_0_hat: seen.append(x_0_hat),
    )
    assert (torch.stack([*seen, x]) == expected).all()


def config(sampler, n=None, **changes):
    return SampleConfig(sampler=sampler, num_sample_steps=n, **changes)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config("ddpm", mean="plain", variance="beta"), partial(ancestral, threshold=None, variance="beta")),
        (
            config("ddpm", 9, variance="beta_tilde", clip_x_0=False),
            partial(ancestral, timesteps=uniform(100, 9)),
        ),
        (
            config("ddim", 9, eta=0.5, clip_x_0=False),
            partial(ddim, timesteps=uniform(100, 9), eta=0.5, threshold=None),
        ),
        (config("ddim"), partial(ddim, timesteps=uniform(100, 50))),
        (
            config("dpmpp_2m", 9, spacing="karras", rho=5.0),
            partial(dpmpp_2m, timesteps=karras(SHORT, 9, rho=5.0)),
        ),
        (config("dpmpp_2m", 9, eta=0.5), partial(dpmpp_2m, timesteps=karras(SHORT, 9), eta=0.5)),
        (
            config("heun", 9, spacing="quadratic"),
            partial(heun, timesteps=quadratic(100, 9)),
        ),
        (
            config("mix", 300, clip_x_0=False),
            lambda denoise, _, noise: mix(denoise, noise, num_sample_steps=300, threshold=None),
        ),
    ],
    ids="ancestral ancestral-few ddim ddim-default dpmpp_2m dpmpp_2m-eta heun mix".split(),
)
def test_build(config, expected):
    def denoise(x_t, t):
        return Denoised(0.9 * x_t.roll(1, 3) + 1, 0.5 * x_t)

    sampler = build.bind_sampler(kinds.sampler(config.sampler).load(), config, SHORT, 64)
    seen = []
    x = expected(denoise, SHORT, normal((2, 1, 2, 2)))
    assert torch.equal(sampler(denoise, normal((2, 1, 2, 2))), x)
    assert torch.equal(sampler(denoise, normal((2, 1, 2, 2)), lambda *step: seen.append(step)), x) and seen
