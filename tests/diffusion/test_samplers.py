"""Samplers on problems with known answers, and step for step against diffusers."""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_dpmsolver_multistep
from support.exact_denoisers import finite, gaussian, normal, toy_denoiser

from ddpm.config import SampleConfig
from ddpm.diffusion import process, samplers, schedules
from ddpm.diffusion.denoisers import clip, dynamic
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.samplers import PerImageNoise, ancestral, ddim, dpmpp_2m, heun, mix
from ddpm.diffusion.timesteps import karras, quadratic, uniform
from ddpm.utils.generators import PhiloxGenerator

LINEAR = schedules.linear(1000, 1e-4, 0.02)
COSINE = schedules.cosine(1000)
SHORT = schedules.linear(100, 1e-3, 0.2)
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
"""Every sampler with a net, in ten steps of SHORT."""
each_sampler = pytest.mark.parametrize("sample", ALL.values(), ids=ALL.keys())


class CountedNoise:
    def __init__(self, noise):
        self.noise, self.count = noise, 0

    def __call__(self):
        self.count += 1
        return self.noise()


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("threshold", [clip, None], ids=["clipped", "plain"])
def test_ancestral_reaches_the_moments_of_gaussian_data(schedule, threshold, variance):
    noise = normal((100, 1, 10, 20))  # 20,000 pixels: the mean is known to 0.0014, the std to 0.001
    x = ancestral(gaussian(schedule, 0.3, 0.2), schedule, noise, threshold=threshold, variance=variance)
    assert x.mean().item() == pytest.approx(0.3, abs=0.006)
    assert x.std().item() == pytest.approx(0.2, rel=0.03)


@pytest.mark.parametrize("num_timesteps", [10, 100])
def test_ancestral_with_variance_beta_is_exact_for_standard_normal_data(num_timesteps):
    """Then mean = sqrt(alpha) x, so the variance stays alpha + beta = 1 for any T; the last step adds no noise."""
    schedule = schedules.linear(num_timesteps, 0.01, 0.2)
    seen = []
    x = ancestral(
        gaussian(schedule, 0.0, 1.0),
        schedule,
        normal((100, 1, 20, 20)),
        threshold=None,
        variance="beta",
        on_step=lambda step, x_t, x_0_hat: seen.append(x_t.std().item()),
    )
    assert seen == pytest.approx([1.0] * num_timesteps, abs=0.02)
    assert x.std().item() == pytest.approx(0.99**0.5, abs=0.015)
    torch.testing.assert_close(x.std(), 0.99**0.5 * torch.tensor(seen[-1]).double(), rtol=1e-6, atol=0)


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
    fine = schedules.linear(
        25_601, 2.5e-6, 8e-4
    )  # T far above the number of steps: rounding to whole t has no effect
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


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("threshold", [clip, None], ids=["clipped", "plain"])
@pytest.mark.parametrize(
    ("sample", "timesteps"), [(ddim, uniform(1000, 500)), (dpmpp_2m, karras(LINEAR, 100))]
)
def test_moments_of_gaussian_data_are_reached_with_any_eta(sample, timesteps, eta, threshold):
    noise = normal((100, 1, 10, 20))
    denoise = gaussian(LINEAR, -0.3, 0.2)
    x = sample(denoise, LINEAR, noise, timesteps=timesteps, eta=eta, threshold=threshold)
    assert x.mean().item() == pytest.approx(-0.3, abs=0.006)
    assert x.std().item() == pytest.approx(0.2, rel=0.04)


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
    g = torch.Generator().manual_seed(3)
    points = (2 * torch.rand((4, 1, 4, 4), generator=g, dtype=torch.float64) - 1).sign()
    x = sample(finite(schedule, points), schedule, normal((200, 1, 4, 4)))
    distance = (x[:, None] - points).flatten(2).norm(dim=2)
    nearest = distance.min(1)
    assert nearest.values.max() < 1e-3
    assert torch.bincount(nearest.indices, minlength=4).tolist() == pytest.approx([50] * 4, abs=31)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("clipped", [True, False])
def test_ancestral_equals_diffusers_step_for_step(clipped, variance):
    shape, net = (3, 2, 4, 4), toy_denoiser(SHORT)
    g = torch.Generator().manual_seed(0)
    theirs = DDPMScheduler(
        num_train_timesteps=100,
        clip_sample=clipped,
        variance_type={"beta": "fixed_large", "beta_tilde": "fixed_small"}[variance],
    )
    theirs.alphas_cumprod = SHORT.alpha_bar  # ours, in float64
    theirs.one = torch.ones((), dtype=torch.float64)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    expected = [x]
    for t in theirs.timesteps:
        x = theirs.step(net(x, t.expand(3)).eps_hat, int(t), x, generator=g).prev_sample
        expected.append(x)

    seen = []
    x = ancestral(
        net,
        SHORT,
        normal(shape),
        threshold=clip if clipped else None,
        variance=variance,
        on_step=lambda step, x_t, x_0_hat: seen.append(x_t),
    )
    for ours, other in zip([*seen, x], expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("num_sample_steps", [12, 100])
def test_ddim_equals_diffusers_step_for_step(num_sample_steps, clipped, eta):
    shape, net = (3, 2, 4, 4), toy_denoiser(SHORT)
    timesteps = uniform(100, num_sample_steps)
    stride = timesteps[0] - timesteps[1]
    noise = normal(shape)
    theirs = DDIMScheduler(num_train_timesteps=100, clip_sample=clipped)
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = SHORT.alpha_bar, torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(100 // stride)
    x = noise()
    expected = [x]
    for t in timesteps:
        z = noise() if eta > 0 and t > 0 else torch.zeros(shape, dtype=torch.float64)
        eps_hat = net(x, torch.full((3,), t)).eps_hat
        x = theirs.step(
            eps_hat, t, x, eta=eta, use_clipped_model_output=clipped, variance_noise=z
        ).prev_sample
        expected.append(x)

    seen = []
    x = ddim(
        net,
        SHORT,
        normal(shape),
        timesteps=timesteps,
        eta=eta,
        threshold=clip if clipped else None,
        on_step=lambda step, x_t, x_0_hat: seen.append(x_t),
    )
    for ours, other in zip([*seen, x], expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize(("num_timesteps", "num_sample_steps"), [(100, 12), (100, 20), (1000, 20)])
def test_dpmpp_2m_equals_diffusers_step_for_step(
    num_timesteps, num_sample_steps, clipped, eta, algorithm, monkeypatch
):
    """With more than 15 steps diffusers' last step has order 1 only because sigma is 0 there, as in ours."""
    schedule, shape = schedules.linear(num_timesteps, 1e-3, 20 / num_timesteps), (3, 2, 4, 4)
    net, timesteps = toy_denoiser(schedule), karras(schedule, num_sample_steps)
    theirs = DPMSolverMultistepScheduler(
        num_train_timesteps=num_timesteps, thresholding=clipped, algorithm_type=algorithm
    )
    # diffusers rounds every x_t to float32, whatever the input.
    in_float64 = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", in_float64)
    # Our steps, in float64; its dynamic threshold is at most sample_max_value = 1, so that it clips.
    theirs.num_inference_steps, theirs.timesteps = num_sample_steps, torch.tensor(timesteps)
    theirs.sigmas = torch.cat([schedule.sigma[timesteps], torch.zeros(1, dtype=torch.float64)])
    noise = normal(shape)
    x = noise()
    expected = [x]
    for t in timesteps:
        z = noise() if eta > 0 and t > 0 else torch.zeros(shape, dtype=torch.float64)
        x = theirs.step(net(x, torch.full((3,), t)).eps_hat, t, x, variance_noise=z).prev_sample
        expected.append(x)

    seen = []
    x = dpmpp_2m(
        net,
        schedule,
        normal(shape),
        timesteps=timesteps,
        eta=eta,
        threshold=clip if clipped else None,
        on_step=lambda step, x_t, x_0_hat: seen.append(x_t),
    )
    for ours, other in zip([*seen, x], expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("threshold", [clip, None], ids=["clipped", "plain"])
def test_dpmpp_2m_without_eta_is_algorithm_2_bit_for_bit(threshold):
    shape, net, timesteps = (2, 1, 4, 4), toy_denoiser(SHORT), karras(SHORT, 12)
    signal = [*SHORT.alpha_bar[timesteps].sqrt().tolist(), 1.0]
    sigma = [*SHORT.sigma[timesteps].tolist(), 0.0]
    x, before = normal(shape, dtype=torch.float32)(), None
    for i, t in enumerate(timesteps):
        x_0_hat, shrink = net(x, torch.full((2,), t)).x_0_hat, sigma[i + 1] / sigma[i]
        if threshold:
            x_0_hat = x_0_hat.clamp(-1, 1)
        D = x_0_hat
        if 0 < i < 11:
            r = math.log(sigma[i - 1] / sigma[i]) / -math.log(shrink)
            D = x_0_hat + (x_0_hat - before) / (2 * r)
        x = signal[i + 1] * (shrink / signal[i] * x + (1 - shrink) * D)
        before = x_0_hat
    noise = CountedNoise(normal(shape, dtype=torch.float32))
    assert torch.equal(dpmpp_2m(net, SHORT, noise, timesteps=timesteps, eta=0.0, threshold=threshold), x)
    assert noise.count == 1


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta_sets_how_much_noise_dpmpp_2m_replaces(eta):
    """Data that are one point: x_t follows q(x_t | x_0) exactly, and e^-(eta h) of its noise is the previous step's."""
    seen, timesteps = [], karras(SHORT, 8)
    dpmpp_2m(
        gaussian(SHORT, 0.7, 0.0),
        SHORT,
        normal((200, 1, 20, 20)),
        timesteps=timesteps,
        eta=eta,
        on_step=lambda step, x_t, x_0_hat: seen.append(x_t),
    )
    alpha_bar, sigma = SHORT.alpha_bar[timesteps], SHORT.sigma[timesteps]
    eps = [(x - a.sqrt() * 0.7) / (1 - a).sqrt() for x, a in zip(seen, alpha_bar, strict=True)]
    assert [e.mean().item() for e in eps] == pytest.approx([0] * 8, abs=0.02)
    assert [e.var().item() for e in eps] == pytest.approx([1] * 8, rel=0.03)
    kept = [(a * b).mean().item() for a, b in pairwise(eps)]
    assert kept == pytest.approx(((sigma[1:] / sigma[:-1]) ** eta).tolist(), abs=0.02)


def test_heun_is_algorithm_1_line_by_line():
    """Karras et al. 2022, with D(y, sigma) = x_0_hat, and their s(t) = 1."""
    timesteps, shape, net = karras(SHORT, 8), (3, 2, 4, 4), toy_denoiser(SHORT)
    level = {float(SHORT.sigma[t]): t for t in timesteps}

    def D(y, sigma):  # noqa: N802
        return net(y * SHORT.alpha_bar[level[sigma]].sqrt(), torch.full((3,), level[sigma])).x_0_hat.clamp(
            -1, 1
        )

    sigmas = [*level, 0.0]
    y = normal(shape)() / SHORT.alpha_bar[timesteps[0]].sqrt()
    for sigma, sigma_next in pairwise(sigmas):
        d = (y - D(y, sigma)) / sigma
        y_next = y + (sigma_next - sigma) * d
        if sigma_next != 0:
            d_next = (y_next - D(y_next, sigma_next)) / sigma_next
            y_next = y + (sigma_next - sigma) * (d / 2 + d_next / 2)
        y = y_next
    torch.testing.assert_close(heun(net, SHORT, normal(shape), timesteps=timesteps), y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("timesteps", [uniform(100, 100), uniform(100, 10), quadratic(100, 7), [40]])
def test_ddim_with_eta_one_is_ancestral(timesteps):
    denoise, shape = gaussian(SHORT, 0.3, 0.2), (2, 1, 4, 4)
    ours = ddim(denoise, SHORT, normal(shape), timesteps=timesteps, eta=1.0)
    expected = ancestral(denoise, SHORT, normal(shape), timesteps=timesteps)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_first_step_of_dpmpp_2m_is_that_of_ddim(eta):
    """The first step has no previous step; so, with eta = 1, it is that of ancestral."""
    net, shape, settings = toy_denoiser(SHORT), (2, 1, 4, 4), {"timesteps": [80, 30], "eta": eta}
    ours = dpmpp_2m(net, SHORT, normal(shape), **settings)
    torch.testing.assert_close(ours, ddim(net, SHORT, normal(shape), **settings), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("threshold", [clip, None])
def test_ancestral_on_all_steps_is_algorithm_2_bit_for_bit(threshold, variance):
    shape, net, schedule = (2, 1, 4, 4), toy_denoiser(SHORT), SHORT
    variances = schedule.beta if variance == "beta" else schedule.posterior_variance
    noise = normal(shape, dtype=torch.float32)
    x = noise()
    for t in reversed(range(100)):
        x_0_hat, eps_hat, _ = net(x, torch.full((2,), t))
        if threshold:
            x = process.posterior_mean(schedule, x_0_hat.clamp(-1, 1), x, torch.full((2,), t))
        else:
            beta, alpha, alpha_bar = (
                float(a[t]) for a in (schedule.beta, schedule.alpha, schedule.alpha_bar)
            )
            x = (x - beta / (1 - alpha_bar) ** 0.5 * eps_hat) / alpha**0.5
        if t > 0:
            x = x + float(variances[t]) ** 0.5 * noise()
    settings = {"variance": variance, "threshold": threshold}
    for timesteps in (None, range(99, -1, -1), uniform(100, 100), karras(SHORT, 100)):
        noise = normal(shape, dtype=torch.float32)
        assert torch.equal(ancestral(net, SHORT, noise, timesteps=timesteps, **settings), x)


@pytest.mark.parametrize("timesteps", [uniform(100, 10), quadratic(100, 10), [60, 7]])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_ancestral_on_a_subsequence_samples_the_posterior_of_the_jump(timesteps, variance):
    """Data that are one point: how much of x_t's noise is kept and added follows from the two alpha_bars."""
    seen = []
    ancestral(
        gaussian(SHORT, 0.7, 0.0),
        SHORT,
        normal((200, 1, 20, 20)),
        timesteps=timesteps,
        variance=variance,
        on_step=lambda step, x_t, x_0_hat: seen.append(x_t.var().item()),
    )
    expected = [1.0]
    for t, t_prev in pairwise(timesteps):
        alpha_bar, before = float(SHORT.alpha_bar[t]), float(SHORT.alpha_bar[t_prev])
        alpha = alpha_bar / before
        kept = alpha**0.5 * (1 - before) / (1 - alpha_bar)
        added = 1 - alpha if variance == "beta" else (1 - before) / (1 - alpha_bar) * (1 - alpha)
        expected.append(kept**2 * expected[-1] + added)
        if variance == "beta_tilde":
            assert expected[-1] == pytest.approx(1 - before, rel=1e-3)  # q(x_t | x_0) itself
    assert seen == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("sample", "draws"),
    [
        (ancestral, 100),
        (ALL["ddpm"], 10),
        (ALL["ddim"], 1),
        (ALL["ddim-eta"], 10),
        (ALL["dpmpp_2m"], 1),
        (ALL["dpmpp_2m-eta"], 10),
        (ALL["heun"], 1),
    ],
)
def test_no_noise_at_the_last_step(sample, draws):
    """Noise is drawn for x_T and for every step but the last; the result is exactly the last x_0_hat."""
    noise, last = CountedNoise(normal((2, 1, 4, 4))), []

    def denoise(x_t, t):
        denoised = gaussian(SHORT, 0.3, 0.2)(x_t, t)
        last[:] = [t, denoised.x_0_hat.clamp(-1, 1)]
        return denoised

    x = sample(denoise, SHORT, noise)
    assert noise.count == draws
    assert last[0].tolist() == [0, 0]  # the first timestep is sampled
    torch.testing.assert_close(x, last[1], rtol=1e-12, atol=0)


def generators(seeds):
    return [PhiloxGenerator(seed) for seed in seeds]


@each_sampler
def test_an_image_depends_only_on_its_seed(sample):
    denoise, shape = gaussian(SHORT, 0.3, 0.2), (3, 4, 4)
    x = sample(denoise, SHORT, PerImageNoise(generators(range(10, 16)), shape))
    alone = sample(denoise, SHORT, PerImageNoise(generators([13]), shape))
    reordered = sample(denoise, SHORT, PerImageNoise(generators([15, 13, 10]), shape))
    assert torch.equal(x[3:4], alone)
    assert torch.equal(x[[5, 3, 0]], reordered)
    assert not torch.equal(x[0], x[1])


def test_per_image_noise():
    noise = PerImageNoise(generators(range(50)), (3, 8, 8))
    first, second = noise(), noise()
    assert first.shape == (50, 3, 8, 8) and first.dtype == torch.float32
    assert first.mean().item() == pytest.approx(0, abs=0.05) and first.std().item() == pytest.approx(
        1, abs=0.05
    )
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

    largest = {}
    for name, threshold in (("clipped", clip), ("plain", None)):
        seen = []
        x = ancestral(
            denoise,
            COSINE,
            normal((4, 1, 4, 4)),
            threshold=threshold,
            on_step=lambda step, x_t, x_0_hat, seen=seen: seen.append(x_t.abs().max().item()),
        )
        largest[name] = max(seen), x.abs().max().item()
    assert largest["clipped"][0] < 6 and largest["clipped"][1] <= 1
    assert largest["plain"][1] > 30
    x = ddim(denoise, COSINE, normal((4, 1, 4, 4)), timesteps=uniform(1000, 50))
    assert x.abs().max() <= 1


def test_mix_equals_the_loop_of_the_course():
    g = torch.Generator().manual_seed(0)
    u = 2 * torch.rand((4, 1, 5, 5), generator=g, dtype=torch.float64) - 1
    amounts, seen = [], []

    def net(x):
        return torch.tanh(x.roll(1, 2) + 0.3)

    def denoise(x_t, amount):
        amounts.append(amount)
        return Denoised(net(x_t), x_t)

    x, n = u, 5
    expected = [x]
    for i in range(n):
        factor = 1 / (n - i)
        x = x * (1 - factor) + net(x) * factor
        expected.append(x)
    out = mix(denoise, lambda: u, num_sample_steps=n, on_step=lambda i, x_t, x_0_hat: seen.append(x_t))
    for ours, other in zip([*seen, out], expected, strict=True):
        torch.testing.assert_close(ours, other)
    torch.testing.assert_close(torch.stack(amounts)[:, 0], torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]))


def test_mix_with_a_constant_prediction_passes_through_the_forward_process():
    c, u = torch.full((2, 1, 3, 3), 0.5), 2 * torch.rand(2, 1, 3, 3) - 1
    seen = []
    out = mix(lambda x_t, amount: seen.append((x_t, amount)) or Denoised(c, u), lambda: u, num_sample_steps=7)
    torch.testing.assert_close(out, c, rtol=0, atol=0)
    for x_t, amount in seen:
        torch.testing.assert_close(x_t, process.mix(c, amount, u))


@pytest.mark.parametrize("threshold", [clip, None])
def test_mix_clips(threshold):
    u = torch.zeros(1, 1, 2, 2)
    x = mix(lambda x, amount: Denoised(u + 3, u), lambda: u, num_sample_steps=2, threshold=threshold)
    assert (x == (1 if threshold else 3)).all()


@pytest.mark.parametrize(
    ("sample", "n"), [(ancestral, 100), *[(sample, 10) for sample in ALL.values()]], ids=["all", *ALL]
)
def test_on_step_sees_every_step_and_no_graph_is_built(sample, n):
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def denoise(x_t, t):
        return Denoised(*(weight * a for a in gaussian(SHORT, 0.0, 0.5)(x_t, t)[:2]))

    seen = []
    x = sample(
        denoise,
        SHORT,
        normal((2, 1, 2, 2)),
        on_step=lambda step, x_t, x_0_hat: seen.append((step, x_t, x_0_hat)),
    )
    assert [step for step, _, _ in seen] == list(range(n))
    torch.testing.assert_close(seen[0][1], normal((2, 1, 2, 2))())
    torch.testing.assert_close(seen[-1][2], x)
    assert not x.requires_grad


@each_sampler
def test_the_sampler_uses_the_threshold(sample):
    """A net that always predicts 3: 1 when clipped, 1 with dynamic thresholding, 3 without threshold."""

    def denoise(x_t, t):
        x_0_hat = torch.full_like(x_t, 3.0)
        return Denoised(x_0_hat, process.predict_eps_from_x_0(SHORT.alpha_bar, x_t, t, x_0_hat))

    for threshold, expected in ((clip, 1.0), (dynamic(0.9), 1.0), (lambda x: x / 2, 1.5)):
        seen = []
        x = sample(
            denoise,
            SHORT,
            normal((2, 1, 2, 2)),
            threshold=threshold,
            on_step=lambda step, x_t, x_0_hat, seen=seen: seen.append(x_0_hat),
        )
        assert (torch.stack(seen) == expected).all()
        torch.testing.assert_close(x, torch.full_like(x, expected))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            SampleConfig(sampler="ddpm", mean="plain", variance="beta", clip_x_0=True),
            partial(ancestral, threshold=None, variance="beta"),
        ),
        (
            SampleConfig(sampler="ddpm", variance="beta_tilde", num_sample_steps=9, clip_x_0=False),
            partial(ancestral, timesteps=uniform(100, 9)),
        ),
        (
            SampleConfig(sampler="ddim", num_sample_steps=9, eta=0.5, clip_x_0=False),
            partial(ddim, timesteps=uniform(100, 9), eta=0.5, threshold=None),
        ),
        (SampleConfig(sampler="ddim"), partial(ddim, timesteps=uniform(100, 50))),
        (
            SampleConfig(sampler="dpmpp_2m", num_sample_steps=9, spacing="karras", rho=5.0),
            partial(dpmpp_2m, timesteps=karras(SHORT, 9, rho=5.0)),
        ),
        (
            SampleConfig(sampler="dpmpp_2m", num_sample_steps=9, eta=0.5),
            partial(dpmpp_2m, timesteps=karras(SHORT, 9), eta=0.5),
        ),
        (
            SampleConfig(sampler="heun", num_sample_steps=9, spacing="quadratic", dynamic_threshold=0.9),
            partial(heun, timesteps=quadratic(100, 9), threshold=dynamic(0.9)),
        ),
        (
            SampleConfig(sampler="mix", num_sample_steps=300, clip_x_0=False),
            lambda d, s, n, on_step: mix(d, n, num_sample_steps=300, threshold=None, on_step=on_step),
        ),
    ],
    ids="ancestral ancestral-few ddim ddim-default dpmpp_2m dpmpp_2m-eta heun mix".split(),
)
def test_build(config, expected):
    def denoise(x_t, t):
        return Denoised(0.9 * x_t.roll(1, 3) + 1, 0.5 * x_t)

    seen, wanted = [], []
    x = samplers.build(config, SHORT, 64)(denoise, normal((2, 1, 2, 2)), lambda *step: seen.append(step[0]))
    y = expected(denoise, SHORT, normal((2, 1, 2, 2)), on_step=lambda *step: wanted.append(step[0]))
    assert torch.equal(x, y) and seen == wanted and seen
    assert torch.equal(samplers.build(config, SHORT, 64)(denoise, normal((2, 1, 2, 2))), y)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SampleConfig(sampler="ddim", num_sample_steps=101), r"num_sample_steps is 101; .* 1..100"),
        (SampleConfig(sampler="ddim", num_sample_steps=0), "num_sample_steps is 0"),
        (SampleConfig(sampler="ddim", eta=1.5), r"eta is 1.5; .* \[0, 1\]"),
        (SampleConfig(sampler="dpmpp_2m", eta=-0.5), r"eta is -0.5; .* \[0, 1\]"),
        (SampleConfig(sampler="mix", num_sample_steps=0), "num_sample_steps is 0; .* 1, 2"),
        (SampleConfig(sampler="ddpm", mean="mode"), "mean is 'mode'"),
        (SampleConfig(sampler="ddpm"), "variance is 'auto'; it must be resolved"),
        (
            SampleConfig(sampler="ddpm", variance="measured"),
            "variance is 'measured'; that needs the error",
        ),
        (SampleConfig(sampler="auto"), "sampler is 'auto'"),
        (SampleConfig(sampler="heun", spacing="log"), "spacing is 'log'"),
        (SampleConfig(sampler="heun", spacing="karras", rho=0.5), "rho is 0.5"),
        (SampleConfig(sampler="ddim", dynamic_threshold=0.0), r"dynamic_threshold is 0.0; .* \(0, 1\]"),
    ],
)
def test_build_rejects_invalid_configs_before_sampling(config, message):
    with pytest.raises(ValueError, match=message):
        samplers.build(config, SHORT, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sample: sample(ancestral, variance="big"), "variance is 'big'"),
        (lambda sample: sample(ddim, timesteps=TEN, eta=-0.1), "eta is -0.1"),
        (lambda sample: sample(dpmpp_2m, timesteps=TEN, eta=1.1), "eta is 1.1"),
        (lambda sample: sample(ddim, timesteps=[5, 5]), "timesteps are .* must fall"),
        (lambda sample: sample(ancestral, timesteps=[]), "timesteps are"),
        (lambda sample: sample(heun, timesteps=[100, 0]), r"timesteps are \[100, 0\]; .* within 99..0"),
        (lambda sample: sample(dpmpp_2m, timesteps=[0, -1]), "timesteps are"),
        (
            lambda sample: mix(toy_denoiser(SHORT), normal((1, 1, 2, 2)), num_sample_steps=0),
            "num_sample_steps is 0",
        ),
    ],
)
def test_invalid_arguments_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(lambda sample, **settings: sample(toy_denoiser(SHORT), SHORT, normal((1, 1, 2, 2)), **settings))
