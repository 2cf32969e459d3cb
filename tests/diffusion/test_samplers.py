"""Samplers on problems with known answers, and step for step against diffusers."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ddpm.config import SampleConfig
from ddpm.diffusion import process, samplers, schedules
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.samplers import PerImageNoise, ancestral, ddim, ddim_timesteps, guided, mix

LINEAR = schedules.linear(1000, 1e-4, 0.02)
COSINE = schedules.cosine(1000)
SHORT = schedules.linear(100, 1e-3, 0.2)


def from_x_0(schedule, predict):
    """A denoiser out of x_0_hat = predict(x_t, alpha_bar[t])."""

    def denoise(x_t, t):
        x_0_hat = predict(x_t, schedule.alpha_bar[t].view(-1, 1, 1, 1).to(x_t.dtype))
        return Denoised(x_0_hat, process.predict_eps_from_x_0(schedule.alpha_bar, x_t, t, x_0_hat))

    return denoise


def gaussian(schedule, mean, std):
    """The exact denoiser of data from N(mean, std^2): x_0 and x_t are jointly normal."""

    def predict(x_t, alpha_bar):
        gain = alpha_bar.sqrt() * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        return mean + gain * (x_t - alpha_bar.sqrt() * mean)

    return from_x_0(schedule, predict)


def finite(schedule, points):
    """The exact denoiser of a finite data set [N, C, H, W]: its average, weighted by the posterior."""

    def predict(x_t, alpha_bar):
        distance = (x_t[:, None] - alpha_bar[:, None].sqrt() * points).square().flatten(2).sum(2)
        posterior = (-distance / (2 * (1 - alpha_bar.flatten(1)))).softmax(1)
        return torch.einsum("bn,nchw->bchw", posterior, points)

    return from_x_0(schedule, predict)


def a_net(schedule):
    """Some eps_hat with large values, so that x_0_hat is clipped now and then."""

    def denoise(x_t, t):
        eps_hat = 2 * torch.tanh(x_t.roll(1, 3) - 0.5 * x_t + t.view(-1, 1, 1, 1) / 50)
        return Denoised(process.predict_x_0_from_eps(schedule.alpha_bar, x_t, t, eps_hat), eps_hat)

    return denoise


def normal(shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=dtype)


class Counted:
    def __init__(self, noise):
        self.noise, self.count = noise, 0

    def __call__(self):
        self.count += 1
        return self.noise()


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("mean", ["clipped", "plain"])
def test_ancestral_reaches_the_moments_of_gaussian_data(schedule, mean, variance):
    noise = normal((100, 1, 10, 20))  # 20,000 pixels: the mean is known to 0.0014, the std to 0.001
    x = ancestral(gaussian(schedule, 0.3, 0.2), schedule, noise, mean=mean, variance=variance)
    assert x.mean().item() == pytest.approx(0.3, abs=0.006)
    assert x.std().item() == pytest.approx(0.2, rel=0.03)


@pytest.mark.parametrize("num_timesteps", [10, 100])
def test_ancestral_with_variance_beta_is_exact_for_standard_normal_data(num_timesteps):
    """Then mean = sqrt(alpha) x, so the variance stays alpha + beta = 1 for any T; the last adds none."""
    schedule = schedules.linear(num_timesteps, 0.01, 0.2)
    seen = []
    x = ancestral(
        gaussian(schedule, 0.0, 1.0),
        schedule,
        normal((100, 1, 20, 20)),
        mean="plain",
        variance="beta",
        on_step=lambda step, x_t, x_0_hat: seen.append(x_t.std().item()),
    )
    assert seen == pytest.approx([1.0] * num_timesteps, abs=0.02)
    assert x.std().item() == pytest.approx(0.99**0.5, abs=0.015)
    torch.testing.assert_close(x.std(), 0.99**0.5 * torch.tensor(seen[-1]).double(), rtol=1e-6, atol=0)


def test_ddim_converges_to_the_std_of_gaussian_data_with_order_one():
    """All is affine: the std of the images is the factor that a single x_T = 1 is multiplied by."""
    fine = schedules.linear(10_000, 1e-5, 0.002)  # T far above the steps, so that theirs is the only error
    denoise, one = gaussian(fine, 0.0, 0.2), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    steps = (50, 100, 200, 400, 800)
    stds = [ddim(denoise, fine, lambda: one, num_sample_steps=n, clip_x_0=False).item() for n in steps]
    error = [abs(std / 0.2 - 1) for std in stds]
    assert error[-1] < 0.01
    for coarse, finer in pairwise(error):
        assert 1.8 < coarse / finer < 2.1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip_x_0", [True, False])
def test_ddim_reaches_the_moments_of_gaussian_data(eta, clip_x_0):
    noise = normal((100, 1, 10, 20))
    denoise = gaussian(LINEAR, -0.3, 0.2)
    x = ddim(denoise, LINEAR, noise, num_sample_steps=500, eta=eta, clip_x_0=clip_x_0)
    assert x.mean().item() == pytest.approx(-0.3, abs=0.006)
    assert x.std().item() == pytest.approx(0.2, rel=0.04)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize(
    "sample",
    [
        lambda denoise, schedule, noise: ancestral(denoise, schedule, noise),
        lambda denoise, schedule, noise: ancestral(denoise, schedule, noise, variance="beta"),
        lambda denoise, schedule, noise: ddim(denoise, schedule, noise, num_sample_steps=50),
        lambda denoise, schedule, noise: ddim(denoise, schedule, noise, num_sample_steps=50, eta=1.0),
    ],
    ids=["ancestral-beta_tilde", "ancestral-beta", "ddim", "ddim-eta-1"],
)
def test_a_finite_data_set_is_given_back_point_by_point(sample, schedule):
    g = torch.Generator().manual_seed(3)
    points = (2 * torch.rand((4, 1, 4, 4), generator=g, dtype=torch.float64) - 1).sign()
    x = sample(finite(schedule, points), schedule, normal((200, 1, 4, 4)))
    distance = (x[:, None] - points).flatten(2).norm(dim=2)
    nearest = distance.min(1)
    assert nearest.values.max() < 1e-3
    assert torch.bincount(nearest.indices, minlength=4).tolist() == pytest.approx([50] * 4, abs=31)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("clipped", [True, False])
def test_ancestral_is_diffusers_step_for_step(clipped, variance):
    shape, net = (3, 2, 4, 4), a_net(SHORT)
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
        mean="clipped" if clipped else "plain",
        variance=variance,
        on_step=lambda step, x_t, x_0_hat: seen.append(x_t),
    )
    for ours, other in zip([*seen, x], expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("clip_x_0", [True, False])
@pytest.mark.parametrize("num_sample_steps", [12, 100])
def test_ddim_is_diffusers_step_for_step(num_sample_steps, clip_x_0, eta):
    shape, net = (3, 2, 4, 4), a_net(SHORT)
    timesteps = ddim_timesteps(100, num_sample_steps)
    stride = timesteps[0] - timesteps[1]
    noise = normal(shape)
    theirs = DDIMScheduler(num_train_timesteps=100, clip_sample=clip_x_0)
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = SHORT.alpha_bar, torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(100 // stride)
    x = noise()
    expected = [x]
    for t in timesteps:
        z = noise() if eta > 0 and t > 0 else torch.zeros(shape, dtype=torch.float64)
        eps_hat = net(x, torch.full((3,), t)).eps_hat
        x = theirs.step(
            eps_hat, t, x, eta=eta, use_clipped_model_output=clip_x_0, variance_noise=z
        ).prev_sample
        expected.append(x)

    seen = []
    x = ddim(
        net,
        SHORT,
        normal(shape),
        num_sample_steps=num_sample_steps,
        eta=eta,
        clip_x_0=clip_x_0,
        on_step=lambda step, x_t, x_0_hat: seen.append(x_t),
    )
    for ours, other in zip([*seen, x], expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-8)


def test_ddim_with_all_steps_and_eta_one_is_ancestral():
    denoise, shape = gaussian(SHORT, 0.3, 0.2), (2, 1, 4, 4)
    ours = ddim(denoise, SHORT, normal(shape), num_sample_steps=100, eta=1.0)
    torch.testing.assert_close(ours, ancestral(denoise, SHORT, normal(shape)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 10, 1000])
def test_ddim_timesteps_span_the_whole_schedule(num_timesteps):
    for n in {1, 2, 3, 7, 50, 333, 999, 1000} & set(range(1, num_timesteps + 1)):
        timesteps = ddim_timesteps(num_timesteps, n)
        assert len(timesteps) == n and timesteps[0] == num_timesteps - 1
        assert n == 1 or timesteps[-1] == 0
        strides = {a - b for a, b in pairwise(timesteps)}
        assert not strides or (min(strides) >= 1 and max(strides) - min(strides) <= 1)


@pytest.mark.parametrize(
    ("sample", "draws"),
    [
        (lambda denoise, noise: ancestral(denoise, SHORT, noise), 100),
        (lambda denoise, noise: ddim(denoise, SHORT, noise, num_sample_steps=20), 1),
        (lambda denoise, noise: ddim(denoise, SHORT, noise, num_sample_steps=20, eta=1.0), 20),
    ],
    ids=["ancestral", "ddim", "ddim-eta-1"],
)
def test_no_noise_at_the_last_step(sample, draws):
    """x_T and every step but the last; and what comes out is exactly the last x_0_hat."""
    noise, last = Counted(normal((2, 1, 4, 4))), []

    def denoise(x_t, t):
        denoised = gaussian(SHORT, 0.3, 0.2)(x_t, t)
        last[:] = [t, denoised.x_0_hat.clamp(-1, 1)]
        return denoised

    x = sample(denoise, noise)
    assert noise.count == draws
    assert last[0].tolist() == [0, 0]  # the first timestep is sampled
    torch.testing.assert_close(x, last[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "sample",
    [
        lambda denoise, noise: ancestral(denoise, SHORT, noise),
        lambda denoise, noise: ddim(denoise, SHORT, noise, num_sample_steps=10, eta=0.5),
    ],
    ids=["ancestral", "ddim"],
)
def test_an_image_depends_on_its_seed_alone(sample):
    denoise, shape = gaussian(SHORT, 0.3, 0.2), (3, 4, 4)
    x = sample(denoise, PerImageNoise(range(10, 16), shape))
    alone = sample(denoise, PerImageNoise([13], shape))
    reordered = sample(denoise, PerImageNoise([15, 13, 10], shape))
    assert torch.equal(x[3:4], alone)
    assert torch.equal(x[[5, 3, 0]], reordered)
    assert not torch.equal(x[0], x[1])


def test_per_image_noise():
    noise = PerImageNoise(range(50), (3, 8, 8))
    first, second = noise(), noise()
    assert first.shape == (50, 3, 8, 8) and first.dtype == torch.float32
    assert first.mean().item() == pytest.approx(0, abs=0.05) and first.std().item() == pytest.approx(
        1, abs=0.05
    )
    correlation = torch.corrcoef(torch.cat([first, second]).flatten(1))
    assert (correlation - torch.eye(100)).abs().max() < 6 / 192**0.5
    u = PerImageNoise(range(50), (3, 8, 8), uniform=True)()
    assert -1 <= u.min() < -0.99 and 0.99 < u.max() < 1
    assert u.square().mean().item() == pytest.approx(1 / 3, abs=0.02)


def test_cosine_stays_bounded_when_clipped_and_explodes_when_not():
    """A net that says nothing sensible: the first plain step multiplies its error by 31.6."""

    def denoise(x_t, t):
        eps_hat = torch.ones_like(x_t)
        return Denoised(process.predict_x_0_from_eps(COSINE.alpha_bar, x_t, t, eps_hat), eps_hat)

    largest = {}
    for mean in ("clipped", "plain"):
        seen = []
        x = ancestral(
            denoise,
            COSINE,
            normal((4, 1, 4, 4)),
            mean=mean,
            on_step=lambda step, x_t, x_0_hat, seen=seen: seen.append(x_t.abs().max().item()),
        )
        largest[mean] = max(seen), x.abs().max().item()
    assert largest["clipped"][0] < 6 and largest["clipped"][1] <= 1
    assert largest["plain"][1] > 30
    x = ddim(denoise, COSINE, normal((4, 1, 4, 4)), num_sample_steps=50)
    assert x.abs().max() <= 1


def test_mix_is_the_loop_of_the_course():
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


@pytest.mark.parametrize("clip_x_0", [True, False])
def test_mix_clips(clip_x_0):
    u = torch.zeros(1, 1, 2, 2)
    x = mix(lambda x, amount: Denoised(u + 3, u), lambda: u, num_sample_steps=2, clip_x_0=clip_x_0)
    assert (x == (1 if clip_x_0 else 3)).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_extrapolates_and_stays_consistent(scale):
    cond, uncond = gaussian(SHORT, 0.5, 0.2), gaussian(SHORT, 0.0, 0.5)
    x_t, t = normal((3, 1, 4, 4))(), torch.tensor([0, 50, 99])
    x_0_hat, eps_hat = guided(cond, uncond, scale)(x_t, t)
    c, u = cond(x_t, t).eps_hat, uncond(x_t, t).eps_hat
    torch.testing.assert_close(eps_hat, (1 - scale) * u + scale * c)
    torch.testing.assert_close(process.q_sample(SHORT.alpha_bar, x_0_hat, t, eps_hat), x_t)


def test_guidance_of_scale_one_calls_one_net():
    def unused(x_t, t):
        raise AssertionError("the unconditional net was called")

    cond = gaussian(SHORT, 0.5, 0.2)
    x = ancestral(guided(cond, unused, 1.0), SHORT, normal((2, 1, 2, 2)))
    assert torch.equal(x, ancestral(cond, SHORT, normal((2, 1, 2, 2))))


def test_on_step_sees_every_step_and_no_graph_is_built():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def denoise(x_t, t):
        return Denoised(*(weight * a for a in gaussian(SHORT, 0.0, 0.5)(x_t, t)))

    for sample, n in [
        (lambda on_step: ancestral(denoise, SHORT, normal((2, 1, 2, 2)), on_step=on_step), 100),
        (lambda on_step: ddim(denoise, SHORT, normal((2, 1, 2, 2)), num_sample_steps=7, on_step=on_step), 7),
    ]:
        seen = []
        x = sample(lambda step, x_t, x_0_hat, seen=seen: seen.append((step, x_t, x_0_hat)))
        assert [step for step, _, _ in seen] == list(range(n))
        torch.testing.assert_close(seen[0][1], normal((2, 1, 2, 2))())
        torch.testing.assert_close(seen[-1][2], x)
        assert not x.requires_grad


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            SampleConfig(sampler="ancestral", mean="plain", variance="beta"),
            lambda d, n, f: ancestral(d, SHORT, n, mean="plain", variance="beta", on_step=f),
        ),
        (
            SampleConfig(sampler="ddim", num_sample_steps=9, eta=0.5, clip_x_0=False),
            lambda d, n, f: ddim(d, SHORT, n, num_sample_steps=9, eta=0.5, clip_x_0=False, on_step=f),
        ),
        (
            SampleConfig(sampler="mix", num_sample_steps=300, clip_x_0=False),
            lambda d, n, f: mix(d, n, num_sample_steps=300, clip_x_0=False, on_step=f),
        ),
    ],
    ids=["ancestral", "ddim", "mix"],
)
def test_build(config, expected):
    def denoise(x_t, t):
        return Denoised(0.9 * x_t + 1, 0.5 * x_t)

    seen, wanted = [], []
    x = samplers.build(config, SHORT)(denoise, normal((2, 1, 2, 2)), lambda *step: seen.append(step[0]))
    y = expected(denoise, normal((2, 1, 2, 2)), lambda *step: wanted.append(step[0]))
    assert torch.equal(x, y) and seen == wanted and seen
    assert torch.equal(samplers.build(config, SHORT)(denoise, normal((2, 1, 2, 2))), y)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SampleConfig(sampler="ddim", num_sample_steps=101), r"num_sample_steps is 101; .* 1..100"),
        (SampleConfig(sampler="ddim", num_sample_steps=0), "num_sample_steps is 0"),
        (SampleConfig(sampler="ddim", eta=1.5), r"eta is 1.5; .* \[0, 1\]"),
        (SampleConfig(sampler="mix", num_sample_steps=0), "num_sample_steps is 0; .* 1, 2"),
        (SampleConfig(sampler="ancestral", mean="mode"), "mean is 'mode'"),
        (SampleConfig(sampler="ancestral", variance="learned"), "variance is 'learned'"),
        (SampleConfig(sampler="auto"), "sampler is 'auto'"),
    ],
)
def test_build_names_mistakes_before_anything_is_sampled(config, message):
    with pytest.raises(ValueError, match=message):
        samplers.build(config, SHORT)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda: ancestral(a_net(SHORT), SHORT, normal((1, 1, 2, 2)), mean="mode"), "mean is 'mode'"),
        (lambda: ancestral(a_net(SHORT), SHORT, normal((1, 1, 2, 2)), variance="big"), "variance is 'big'"),
        (lambda: ddim(a_net(SHORT), SHORT, normal((1, 1, 2, 2)), num_sample_steps=101), "is 101"),
        (
            lambda: ddim(a_net(SHORT), SHORT, normal((1, 1, 2, 2)), num_sample_steps=9, eta=-0.1),
            "eta is -0.1",
        ),
        (lambda: mix(a_net(SHORT), normal((1, 1, 2, 2)), num_sample_steps=0), "num_sample_steps is 0"),
    ],
)
def test_mistakes_are_named(sample, message):
    with pytest.raises(ValueError, match=message):
        sample()
