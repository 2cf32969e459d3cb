"""The variational bound against closed forms, numerical integration, and torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpm.diffusion import process, schedules
from ddpm.diffusion.likelihood import (
    decoder_nll,
    estimate,
    exact,
    posterior_kl,
    prior_kl,
    proposal,
)
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.reverse import fixed_variance, log_prob_of_level

LINEAR = schedules.linear(100, 1e-3, 0.2)
COSINE = schedules.cosine(100)
SHORT = schedules.linear(6, 0.05, 0.7)
BITS = 1 / math.log(2)


def normal(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=torch.float64)


def levels_to_x(level):
    return level.double() / 127.5 - 1


def gaussian(schedule, mean, std):
    """The exact denoiser of data from N(mean, std^2)."""

    def denoise(x_t, t):
        alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        gain = alpha_bar.sqrt() * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        x_0_hat = mean + gain * (x_t - alpha_bar.sqrt() * mean)
        return Denoised(x_0_hat, process.predict_eps_from_x_0(schedule.alpha_bar, x_t, t, x_0_hat))

    return denoise


def gaussian_images(shape, mean, std, seed=1):
    x = mean + std * normal(shape, seed)()
    return levels_to_x(((x + 1) * 127.5).round().clamp(0, 255))


def some_denoiser(x_t, t):
    x_0_hat = 1.5 * torch.tanh(x_t.roll(1, 3) - 0.3 * x_t + t.view(-1, 1, 1, 1) / 50)
    return Denoised(x_0_hat, x_t)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_terms_of_gaussian_data_equal_the_closed_form(schedule):
    """KL_t = (snr_{t-1} - snr_t) / 2 Var(x_0 | x_t) with the exact denoiser and the posterior's variance."""
    mean, std = 0.1, 0.25
    x_0 = gaussian_images((8, 1, 50, 50), mean, std)  # 20,000 pixels: a mean square is known to 1 %
    bound = exact(gaussian(schedule, mean, std), schedule, x_0, normal(x_0.shape), clip_x_0=False)
    snr, alpha_bar = schedule.snr, schedule.alpha_bar
    left = std**2 * (1 - alpha_bar) / (alpha_bar * std**2 + 1 - alpha_bar)
    expected = 0.5 * (snr[:-1] - snr[1:]) * left[1:] * BITS
    torch.testing.assert_close(bound.kl.mean(0), expected, rtol=0.06, atol=0)
    assert bound.kl.sum(1).mean().item() == pytest.approx(expected.sum().item(), rel=0.005)
    last = alpha_bar[-1].item()
    prior = 0.5 * (last * (mean**2 + std**2) - last - math.log1p(-last)) * BITS
    assert bound.prior.mean().item() == pytest.approx(prior, rel=0.02)


def test_the_bound_of_gaussian_data_approaches_its_entropy():
    """With many steps and a suitable variance the bound is tight: the entropy of N(mean, std^2) in grey levels."""
    std, fine = 0.25, schedules.linear(1000, 1e-4, 0.02)
    x_0 = gaussian_images((4, 1, 50, 50), 0.0, std)
    noise = normal(x_0.shape)
    errors = std**2 * (1 - fine.alpha_bar) / (fine.alpha_bar * std**2 + 1 - fine.alpha_bar)
    how = {"variance": "measured", "x_0_error": errors}
    bound = exact(gaussian(fine, 0.0, std), fine, x_0, noise, **how).total.mean().item()
    entropy = (0.5 * math.log(2 * math.pi * math.e * std**2) + math.log(127.5)) * BITS
    assert entropy - 0.01 < bound < entropy + 0.05


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_terms_equal_those_of_torch_distributions(variance):
    x_0, x_0_hat = gaussian_images((3, 2, 4, 4), 0, 0.5), normal((3, 2, 4, 4), 5)()
    x_t, t = normal(x_0.shape, 6)(), torch.tensor([1, 50, 99])
    means = [process.posterior_mean(LINEAR, x, x_t, t) for x in (x_0, x_0_hat)]
    of_q = LINEAR.posterior_variance[t].sqrt().view(-1, 1, 1, 1)
    of_p = of_q if variance == "beta_tilde" else LINEAR.beta[t].sqrt().view(-1, 1, 1, 1)
    right = kl_divergence(Normal(means[0], of_q), Normal(means[1], of_p)).flatten(1).mean(1) * BITS
    torch.testing.assert_close(
        posterior_kl(LINEAR, x_0, t, x_0_hat, fixed_variance(LINEAR, variance)[t].log()), right
    )
    last = LINEAR.alpha_bar[-1]
    prior = kl_divergence(Normal(last.sqrt() * x_0, (1 - last).sqrt()), Normal(torch.zeros_like(x_0), 1.0))
    torch.testing.assert_close(prior_kl(LINEAR, x_0), prior.flatten(1).mean(1) * BITS)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_bound_equals_its_integral_and_lies_above_the_nll(variance):
    """One pixel, six steps, a made-up net: Ho et al. 2020, Eq. 3, and -log p(x_0), both by quadrature.

    Neither uses the posterior: Eq. 3 is E_q[-log p(x_T) - sum_t log p(x_{t-1} | x_t) / q(x_t | x_{t-1})].
    """
    schedule, T = SHORT, SHORT.num_timesteps
    grid = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    step = grid[1] - grid[0]
    variances = schedule.beta if variance == "beta" else schedule.posterior_variance
    variances = torch.cat([schedule.posterior_variance[1:2], variances[1:]])  # as in the code of Ho et al.

    def net(x_t, t):
        return (torch.sin(2 * x_t) / 2 + 0.05 * t).clamp(-1, 1)

    def denoise(x_t, t):
        return Denoised(net(x_t, t.view(-1, 1, 1, 1)), x_t)

    # reverse[t][i, j]: density of x_{t-1} = grid[i] given x_t = grid[j]
    reverse = []
    for t in range(1, T):
        where = torch.full((len(grid),), t)
        x_t = grid.view(-1, 1, 1, 1)
        mean = process.posterior_mean(schedule, denoise(x_t, where).x_0_hat, x_t, where).flatten()
        reverse.append(Normal(mean, variances[t].sqrt()).log_prob(grid[:, None]))
    all_levels = torch.arange(256, dtype=torch.float64)
    decoder = log_prob_of_level(
        all_levels[:, None].expand(256, len(grid)), net(grid, 0).expand(256, -1), variances[0].sqrt()
    )
    # -log p(x_0), by pushing the density of x_T down the chain
    density = Normal(0.0, 1.0).log_prob(grid).exp()
    for log_kernel in reversed(reverse):
        density = log_kernel.exp() @ density * step
    log_p = (decoder.exp() @ density * step).log()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)

    level = torch.tensor([0.0, 60.0, 140.0, 255.0])
    x_0 = levels_to_x(level)
    integral = []
    for i, x in zip(level.int().tolist(), x_0, strict=True):
        marginal = [
            Normal(a.sqrt() * x, (1 - a).sqrt()).log_prob(grid).exp() * step for a in schedule.alpha_bar
        ]
        value = -(marginal[-1] @ Normal(0.0, 1.0).log_prob(grid)) - marginal[0] @ decoder[i]
        value += marginal[0] @ Normal(schedule.alpha[0].sqrt() * x, schedule.beta[0].sqrt()).log_prob(grid)
        for t in range(1, T):
            forward = Normal(schedule.alpha[t].sqrt() * grid, schedule.beta[t].sqrt()).log_prob(grid[:, None])
            joint = forward.exp() * step * marginal[t - 1]  # [x_t, x_{t-1}]
            value += (joint * (forward - reverse[t - 1].T)).sum()
        integral.append(value * BITS)
    integral = torch.stack(integral)

    n = 10_000
    images = x_0.repeat_interleave(n).view(-1, 1, 1, 1)
    bound = exact(denoise, schedule, images, normal(images.shape), variance=variance).total.view(4, n)
    error = bound.std(1) / n**0.5
    assert ((bound.mean(1) - integral).abs() < 4 * error).all()
    assert (error < 0.02 * integral).all()
    assert (integral > -log_p[level.long()] * BITS).all()


def test_probabilities_of_the_levels_sum_to_one():
    level = torch.arange(256, dtype=torch.float64)[:, None]
    mean = torch.tensor([-3.0, -1.0, -0.5, 0.001, 1.0, 40.0], dtype=torch.float64)
    for std in (1e-3, 0.02, 1.0, 50.0):
        log_prob = log_prob_of_level(level, mean, torch.tensor(std, dtype=torch.float64))
        torch.testing.assert_close(log_prob.exp().sum(0), torch.ones_like(mean), rtol=0, atol=1e-12)
        assert log_prob.isfinite().all()


def test_the_decoder_is_accurate_far_from_the_mean():
    """1,000 standard deviations away: -z^2 / 2 - log(z sqrt(2 pi)), at the interval's nearer end."""
    std = torch.tensor(1e-3, dtype=torch.float64)
    for level, mean in ((0.0, 0.2), (255.0, -0.2), (100.0, 0.9), (200.0, -0.9)):
        x = level / 127.5 - 1
        z = (abs(mean - x) - 1 / 255) / 1e-3
        got = log_prob_of_level(torch.tensor(level).double(), torch.tensor(mean).double(), std)
        assert got.item() == pytest.approx(-(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi)), rel=1e-6)


def test_the_decoder_of_a_perfect_and_of_a_poor_prediction():
    x_0 = gaussian_images((2, 1, 8, 8), 0, 0.5)
    nll = decoder_nll(x_0, x_0, torch.full((2,), 1e-8).log())
    assert (nll >= 0).all() and (nll < 1e-9).all()
    wide = torch.full((2,), 1e-3).log()
    assert (decoder_nll(x_0, -x_0, wide) > decoder_nll(x_0, x_0 / 2, wide)).all()


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("num_draws", [1, 5])
def test_an_estimate_agrees_with_the_exact_bound(variance, num_draws):
    x_0 = gaussian_images((600, 1, 4, 4), 0.2, 0.4)
    right = exact(some_denoiser, LINEAR, x_0, normal(x_0.shape, 2), variance=variance)
    pilot = exact(some_denoiser, LINEAR, x_0[:8], normal(x_0[:8].shape, 3), variance=variance)
    chosen = proposal(pilot.kl)
    u = torch.rand(len(x_0), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    got = estimate(
        some_denoiser, LINEAR, x_0, normal(x_0.shape, 5), u, chosen, num_draws=num_draws, variance=variance
    )
    assert got.t.shape == got.kl.shape == (600, num_draws)
    assert got.t.min() >= 1 and got.t.max() <= 99
    difference = got.kl.sum(1) - right.kl.sum(1)
    error = difference.std() / len(x_0) ** 0.5
    assert difference.mean().abs() < 4 * error
    assert error < 0.05 * right.kl.sum(1).mean()
    torch.testing.assert_close(got.prior, right.prior)
    # The estimate of each single t is unbiased too.
    by_t = torch.zeros(100).double().index_add_(0, got.t.flatten(), got.kl.flatten()) / len(x_0)
    halves = [
        (by_t[1:50].sum(), right.kl[:, :49].sum(1).mean()),
        (by_t[50:].sum(), right.kl[:, 49:].sum(1).mean()),
    ]
    for ours, theirs in halves:
        assert ours.item() == pytest.approx(theirs.item(), rel=0.2)


def test_the_average_estimate_over_all_u_is_the_exact_bound():
    """With an x_0_hat that depends only on t, only t is random: the average over u is the sum over t."""

    def denoise(x_t, t):
        return Denoised(torch.ones_like(x_t) * (t / 100).view(-1, 1, 1, 1).double(), x_t)

    x_0 = torch.full((5_000, 1, 1, 1), -1.0, dtype=torch.float64)
    right = exact(denoise, LINEAR, x_0[:2], normal((2, 1, 1, 1)))
    u = (torch.arange(len(x_0)) + 0.5).double() / len(x_0)
    got = estimate(denoise, LINEAR, x_0, normal(x_0.shape), u, proposal(right.kl), num_draws=3)
    by_t = torch.zeros(100).double().index_add_(0, got.t.flatten(), got.kl.flatten()) / len(x_0)
    torch.testing.assert_close(by_t[1:], right.kl[0], rtol=0.08, atol=0)
    torch.testing.assert_close(got.total.mean(), right.total.mean(), rtol=1e-4, atol=0)


def test_clipping_is_that_of_the_sampler():
    def denoise(x_t, t):
        return Denoised(torch.full_like(x_t, 3.0), x_t)

    def clipped(x_t, t):
        return Denoised(torch.ones_like(x_t), x_t)

    x_0, noise = gaussian_images((2, 1, 4, 4), 0, 0.3), normal((2, 1, 4, 4))
    right = exact(clipped, LINEAR, x_0, noise, clip_x_0=False)
    torch.testing.assert_close(exact(denoise, LINEAR, x_0, noise).total, right.total)
    assert (exact(denoise, LINEAR, x_0, noise, clip_x_0=False).total > right.total).all()


def test_importance_sampling_errs_less_than_uniform():
    x_0 = gaussian_images((400, 1, 4, 4), 0.2, 0.4)
    denoise = gaussian(COSINE, 0.2, 0.4)
    u = torch.rand(400, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    pilot = exact(denoise, COSINE, x_0[:8], normal(x_0[:8].shape, 3))
    errors = [
        estimate(denoise, COSINE, x_0, normal(x_0.shape), u, proposal(pilot.kl, share), num_draws=2)
        .kl.sum(1)
        .std()
        for share in (0.1, 1.0)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_a_proposal_follows_the_errors_of_the_pilot():
    kl = torch.tensor([[3.0, 0.0, 1.0]] * 2, dtype=torch.float64)
    torch.testing.assert_close(proposal(kl, 0.3), torch.tensor([0, 0.625, 0.1, 0.275]).double())


def test_one_timestep_has_no_kl():
    one, x_0 = schedules.linear(1, 0.1, 0.1), gaussian_images((2, 1, 4, 4), 0, 0.3)
    for variance in ("beta", "beta_tilde"):
        bound = exact(some_denoiser, one, x_0, normal(x_0.shape), variance=variance)
        assert bound.kl.shape == (2, 0)
        torch.testing.assert_close(bound.total, bound.prior + bound.decoder)


def test_invalid_arguments_are_errors():
    x_0, noise = gaussian_images((2, 1, 4, 4), 0, 0.3), normal((2, 1, 4, 4))
    with pytest.raises(ValueError, match="256 grey levels"):
        exact(some_denoiser, LINEAR, x_0 + 1e-3, noise)
    with pytest.raises(ValueError, match="variance is 'learned', but this net did not learn it"):
        exact(some_denoiser, LINEAR, x_0, noise, variance="learned")
    with pytest.raises(ValueError, match="variance is 'measured'; that needs the error"):
        exact(some_denoiser, LINEAR, x_0, noise, variance="measured")
    with pytest.raises(ValueError, match="variance is 'wide'; it must be"):
        exact(some_denoiser, LINEAR, x_0, noise, variance="wide")
    with pytest.raises(ValueError, match=r"t has a 0"):
        posterior_kl(LINEAR, x_0, torch.tensor([0, 1]), x_0, torch.zeros(2))
    u = torch.zeros(2)
    for wrong in (torch.full((100,), 0.01).double(), torch.zeros(100).double(), torch.ones(3)):
        with pytest.raises(ValueError, match="proposal must be"):
            estimate(some_denoiser, LINEAR, x_0, noise, u, wrong, num_draws=1)
    with pytest.raises(ValueError, match="num_draws is 0"):
        estimate(some_denoiser, LINEAR, x_0, noise, u, torch.ones(100).double(), num_draws=0)
    with pytest.raises(ValueError, match="uniform_share is 0"):
        proposal(exact(some_denoiser, LINEAR, x_0, noise).kl, 0)
