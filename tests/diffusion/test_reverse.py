"""The variance of the reverse process: known answers, and the formulas of Improved DDPM."""

import math

import pytest
import torch
from support.exact_denoisers import ancestral, gaussian, gaussian_errors, grey, normal, toy_denoiser
from torch import nn

from ddpm.diffusion import schedules
from ddpm.diffusion.likelihood import exact, kl_of_errors, x_0_errors
from ddpm.diffusion.objectives import BOUND_WEIGHT, X0, Eps, V
from ddpm.diffusion.reverse import ROUNDING, fixed_variance
from ddpm.diffusion.timesteps import respaced, uniform
from ddpm.utils.generators import PhiloxGenerator

LINEAR = schedules.linear(100, 1e-3, 0.2)
COSINE = schedules.cosine(200)
BITS = 1 / math.log(2)


@pytest.mark.parametrize(
    "schedule", [LINEAR, COSINE, schedules.cosine(40)], ids=["linear", "cosine", "short"]
)
def test_measured_errors_equal_those_of_the_exact_denoiser(schedule):
    """Errors are measured at 64 timesteps and interpolated at the others."""
    x_0 = 0.1 + 0.2 * normal((4, 1, 60, 60), 1)()
    errors = x_0_errors(gaussian(schedule, 0.1, 0.2), schedule, x_0, normal(x_0.shape))
    assert errors.shape == (4, schedule.num_timesteps)
    torch.testing.assert_close(errors.mean(0), gaussian_errors(schedule, 0.2), rtol=0.06, atol=0)


def test_the_measured_variance_is_the_true_variance_of_gaussian_data():
    """x_0 ~ N(m, s^2): x_{t-1} given x_t is Gaussian, and its variance follows from the joint covariance."""
    s = 0.3
    a = COSINE.alpha_bar
    got = fixed_variance(COSINE, "measured", gaussian_errors(COSINE, s))
    v = a * s**2 + 1 - a  # the variance of x_t
    true = v[:-1] - COSINE.alpha[1:] * v[:-1] ** 2 / v[1:]
    torch.testing.assert_close(got[1:], true, rtol=1e-9, atol=0)
    assert got[0] == max(gaussian_errors(COSINE, s)[0], torch.tensor(ROUNDING).double())


@pytest.mark.parametrize("num_steps", [200, 50, 10])
def test_with_the_measured_variance_the_bound_is_tight_at_any_number_of_steps(num_steps):
    """It equals the entropy of N(0, std^2) in grey levels; with beta_tilde it grows without limit for fewer steps."""
    std = 0.25
    timesteps = uniform(200, num_steps)
    chain = respaced(COSINE, timesteps)
    x_0 = grey((4, 1, 50, 50), 0.0, std)
    where = torch.tensor(timesteps[::-1])

    def denoise(x_t, k):
        return gaussian(COSINE, 0.0, std)(x_t, where[k])

    def bound(variance):
        table = fixed_variance(chain, variance, gaussian_errors(chain, std))
        terms = exact(denoise, chain, x_0, normal(x_0.shape), table)
        return (terms.prior + terms.kl.sum(1) + terms.decoder).mean().item()

    entropy = (0.5 * math.log(2 * math.pi * math.e * std**2) + math.log(127.5)) * BITS
    assert bound("measured") == pytest.approx(entropy, abs=0.03)
    if num_steps == 10:
        assert bound("beta_tilde") > entropy + 0.5


def test_no_other_variance_has_a_smaller_divergence():
    errors = 0.01 + normal((50, 100), 2)().square() / 10
    best = fixed_variance(LINEAR, "measured", errors.mean(0))
    kl = kl_of_errors(LINEAR, errors, best).mean(0)
    others = [0.97 * best, 1.03 * best, fixed_variance(LINEAR, "beta"), fixed_variance(LINEAR, "beta_tilde")]
    for other in others:
        assert (kl <= kl_of_errors(LINEAR, errors, other).mean(0) + 1e-12).all()


def test_fixed_variances_equal_those_of_ho_et_al():
    """In their code fixedlarge is [posterior_variance[1], beta[1:]], and fixedsmall has the same first value."""
    for variance, rest in (("beta", LINEAR.beta), ("beta_tilde", LINEAR.posterior_variance)):
        expected = torch.cat([LINEAR.posterior_variance[1:2], rest[1:]])
        assert torch.equal(fixed_variance(LINEAR, variance), expected)


class ToyNet(nn.Module):
    """A net with two channels of prediction and two of variance_mix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1).double()

    def forward(self, x_t, t, label):
        return self.conv(x_t) * (1 + t.view(-1, 1, 1, 1) / 100)


def improved_diffusion(schedule, predict, model, x_0, t, eps):
    """L_hybrid as in Improved DDPM's code (gaussian_diffusion.py, RESCALED_MSE, LEARNED_RANGE), reimplemented.

    Their normal CDF is an approximation; here it is exact.
    """
    a = schedule.alpha_bar
    beta = schedule.beta
    a_prev = torch.cat([torch.ones(1).double(), a[:-1]])
    variance = beta * (1 - a_prev) / (1 - a)
    clipped = torch.cat([variance[1:2], variance[1:]]).log()
    coef_1 = beta * a_prev.sqrt() / (1 - a)
    coef_2 = (1 - a_prev) * (1 - beta).sqrt() / (1 - a)

    def at(table):
        return table[t].view(-1, 1, 1, 1)

    x_t = at(a.sqrt()) * x_0 + at((1 - a).sqrt()) * eps
    output, values = model(x_t, t, None).split(x_0.shape[1], dim=1)
    target = {"eps": eps, "x_0": x_0, "v": at(a.sqrt()) * eps - at((1 - a).sqrt()) * x_0}[predict]
    mse = (target - output).square().flatten(1).mean(1)
    frozen = output.detach()
    frac = (values + 1) / 2
    log_variance = frac * at(beta.log()) + (1 - frac) * at(clipped)
    start = {
        "eps": lambda: (x_t - at((1 - a).sqrt()) * frozen) / at(a.sqrt()),
        "x_0": lambda: frozen,
        "v": lambda: at(a.sqrt()) * x_t - at((1 - a).sqrt()) * frozen,
    }[predict]()
    mean, true_mean = (at(coef_1) * x + at(coef_2) * x_t for x in (start, x_0))
    true = at(clipped)
    kl = 0.5 * (-1 + log_variance - true + (true - log_variance).exp())
    kl = kl + 0.5 * (true_mean - mean).square() * (-log_variance).exp()
    kl = kl.flatten(1).mean(1) / math.log(2)

    def cdf(x):
        return 0.5 * (1 + torch.erf(x / 2**0.5))

    centred = x_0 - mean
    inverse = (-0.5 * log_variance).exp()
    plus = cdf(inverse * (centred + 1 / 255))
    minus = cdf(inverse * (centred - 1 / 255))
    log_probability = torch.where(
        x_0 < -0.999,
        plus.clamp(min=1e-12).log(),
        torch.where(x_0 > 0.999, (1 - minus).clamp(min=1e-12).log(), (plus - minus).clamp(min=1e-12).log()),
    )
    nll = -log_probability.flatten(1).mean(1) / math.log(2)
    vb = torch.where(t == 0, nll, kl) * schedule.num_timesteps / 1000
    return (mse + vb).mean()


class FixedGenerator:
    """A generator that returns the given t and eps."""

    def __init__(self, t, eps):
        self.t = t
        self.eps = eps

    def integers(self, high, shape):
        return self.t

    def normal(self, shape, dtype):
        return self.eps


@pytest.mark.parametrize("predict", ["eps", "x_0", "v"])
def test_l_hybrid_equals_that_of_improved_ddpm(predict):
    """Loss and gradient in float64 at every t; at t = 0 the noise is about as large as a grey level."""
    schedule = schedules.linear(50, 2e-4, 0.3)
    x_0 = grey((50, 2, 4, 4), 0.0, 0.6)
    t = torch.arange(50)
    eps = normal(x_0.shape, 3)()
    if predict == "x_0":  # at t = 0 this model is so far off that their code clamps the probability
        t = t.clamp(min=1)
    kind = {"eps": Eps, "x_0": X0, "v": V}[predict]
    gradients = []
    for loss_of in (
        lambda model: (
            kind(schedule, learns_variance=True).loss(model, x_0, None, FixedGenerator(t, eps)).value
        ),
        lambda model: improved_diffusion(schedule, predict, model, x_0, t, eps),
    ):
        model = ToyNet()
        loss = loss_of(model)
        loss.backward()
        gradients.append((loss.detach(), model.conv.weight.grad, model.conv.bias.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert BOUND_WEIGHT == 1e-3


def test_the_bound_trains_the_variance_and_not_the_mean():
    schedule = schedules.linear(50, 2e-4, 0.3)
    x_0 = grey((20, 1, 4, 4), 0.0, 0.5)
    prediction = torch.zeros_like(x_0, requires_grad=True)
    between = torch.zeros_like(x_0, requires_grad=True)

    def model(x_t, t, label):
        return torch.cat([prediction, between], 1)

    losses = [Eps(schedule, learns_variance=learns) for learns in (True, False)]
    losses[0].loss(model, x_0, None, PhiloxGenerator(1)).value.backward()
    assert between.grad.abs().min() > 0
    alone = torch.zeros_like(x_0, requires_grad=True)
    losses[1].loss(lambda x_t, t, label: alone, x_0, None, PhiloxGenerator(1)).value.backward()
    torch.testing.assert_close(prediction.grad, alone.grad)


def test_gradients_are_finite_and_nonzero_for_a_distant_x_0_hat():
    """At large t the x_0_hat of an untrained net is thousands of standard deviations off; the batch also has t = 0."""
    schedule = schedules.cosine(1000)
    x_0 = grey((8, 1, 4, 4), 0.0, 0.6).float()
    between = torch.zeros_like(x_0, requires_grad=True)
    t = torch.tensor([0, 0, 1, 2, 500, 990, 998, 999])
    generator = FixedGenerator(t, normal(x_0.shape, 3, torch.float32)())
    loss = Eps(schedule, learns_variance=True).loss(
        lambda x_t, t, label: torch.cat([3 - x_t, between], 1), x_0, None, generator
    )
    loss.value.backward()
    assert loss.value.isfinite() and between.grad.isfinite().all() and (between.grad != 0).all()


@pytest.mark.parametrize(("mix", "fixed"), [(0.0, "beta_tilde"), (1.0, "beta")])
def test_a_learned_variance_at_its_limits_equals_the_fixed_one(mix, fixed):
    def denoise(x_t, t):
        return toy_denoiser(LINEAR)(x_t, t)._replace(variance_mix=torch.full_like(x_t, mix))

    def sampled(variance):
        return ancestral(denoise, LINEAR, normal((2, 1, 4, 4)), timesteps=uniform(100, 30), variance=variance)

    torch.testing.assert_close(sampled("learned"), sampled(fixed))
    x_0 = grey((3, 1, 4, 4), 0.0, 0.4)
    tables = (None, fixed_variance(LINEAR, fixed))
    learned, right = (exact(denoise, LINEAR, x_0, normal(x_0.shape), table) for table in tables)
    torch.testing.assert_close(learned.kl, right.kl)
    if mix == 0:
        torch.testing.assert_close(learned.decoder, right.decoder)
