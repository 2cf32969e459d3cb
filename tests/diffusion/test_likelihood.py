"""The variational bound against closed forms, numerical integration, and torch.distributions."""

import math

import pytest
import torch
from support.exact_denoisers import gaussian, gaussian_errors, grey, levels_to_x, normal
from torch.distributions import Normal, kl_divergence

from ddpm.diffusion import likelihood, process, schedules
from ddpm.diffusion.likelihood import draw_timesteps, estimate, posterior_kl, prior_kl, proposal
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.reverse import fixed_variance, log_prob_of_level

LINEAR = schedules.linear(100, 1e-3, 0.2)
COSINE = schedules.cosine(100)
BITS = 1 / math.log(2)


def exact(denoise, schedule, x_0, noise, variance="beta_tilde"):
    return likelihood.exact(denoise, schedule, x_0, noise, fixed_variance(schedule, variance))


def total(bound):
    return bound.prior + bound.kl.sum(1) + bound.decoder


def some_denoiser(x_t, t):
    x_0_hat = 1.5 * torch.tanh(x_t.roll(1, 3) - 0.3 * x_t + t.view(-1, 1, 1, 1) / 50)
    return Denoised(x_0_hat, x_t)


def estimated(denoise, schedule, x_0, drawn, seed=0, variance="beta_tilde"):
    """The estimate from the result of `draw_timesteps`."""
    table = fixed_variance(schedule, variance)
    return estimate(denoise, schedule, x_0, normal(x_0.shape, seed), table, drawn)


def sums_by_t(t, kl):
    """[100]: the mean over images of KL at each of 100 timesteps."""
    return torch.zeros(100).double().index_add_(0, t.flatten(), kl.flatten()) / len(kl)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_terms_of_gaussian_data_equal_the_closed_form(schedule):
    """KL_t = (snr_{t-1} - snr_t) / 2 Var(x_0 | x_t) with the exact denoiser and the posterior's variance."""
    mean = 0.1
    std = 0.25
    x_0 = grey((8, 1, 50, 50), mean, std)  # 20,000 pixels: a mean square is known to 1 %
    bound = exact(gaussian(schedule, mean, std), schedule, x_0, normal(x_0.shape))
    expected = 0.5 * (schedule.snr[:-1] - schedule.snr[1:]) * gaussian_errors(schedule, std)[1:] * BITS
    torch.testing.assert_close(bound.kl.mean(0), expected, rtol=0.06, atol=0)
    assert bound.kl.sum(1).mean().item() == pytest.approx(expected.sum().item(), rel=0.005)
    last = schedule.alpha_bar[-1].item()
    prior = 0.5 * (last * (mean**2 + std**2) - last - math.log1p(-last)) * BITS
    assert bound.prior.mean().item() == pytest.approx(prior, rel=0.02)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_terms_equal_those_of_torch_distributions(variance):
    x_0 = grey((3, 2, 4, 4), 0, 0.5)
    x_0_hat = normal((3, 2, 4, 4), 5)()
    x_t = normal(x_0.shape, 6)()
    t = torch.tensor([1, 50, 99])
    means = [process.posterior_mean(LINEAR, x, x_t, t) for x in (x_0, x_0_hat)]
    of_q = LINEAR.posterior_variance[t].sqrt().view(-1, 1, 1, 1)
    of_p = of_q if variance == "beta_tilde" else LINEAR.beta[t].sqrt().view(-1, 1, 1, 1)
    right = kl_divergence(Normal(means[0], of_q), Normal(means[1], of_p)).flatten(1).mean(1) * BITS
    ours = posterior_kl(LINEAR, x_0, t, x_0_hat, fixed_variance(LINEAR, variance)[t].log())
    torch.testing.assert_close(ours, right)
    last = LINEAR.alpha_bar[-1]
    prior = kl_divergence(Normal(last.sqrt() * x_0, (1 - last).sqrt()), Normal(torch.zeros_like(x_0), 1.0))
    torch.testing.assert_close(prior_kl(LINEAR, x_0), prior.flatten(1).mean(1) * BITS)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_bound_equals_its_integral_and_lies_above_the_nll(variance):
    """One pixel, six steps, a made-up net: Ho et al. 2020, Eq. 3, and -log p(x_0), both by quadrature.

    Neither uses the posterior: Eq. 3 is E_q[-log p(x_T) - sum_t log p(x_{t-1} | x_t) / q(x_t | x_{t-1})].
    """
    schedule = schedules.linear(6, 0.05, 0.7)
    T = 6
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
    bound = total(exact(denoise, schedule, images, normal(images.shape), variance)).view(4, n)
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


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("num_draws", [1, 5])
def test_an_estimate_agrees_with_the_exact_bound(variance, num_draws):
    x_0 = grey((600, 1, 4, 4), 0.2, 0.4)
    right = exact(some_denoiser, LINEAR, x_0, normal(x_0.shape, 2), variance)
    chosen = proposal(exact(some_denoiser, LINEAR, x_0[:8], normal(x_0[:8].shape, 3), variance).kl)
    u = torch.rand(len(x_0), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    drawn = draw_timesteps(LINEAR, chosen, u, num_draws)
    got = estimated(some_denoiser, LINEAR, x_0, drawn, 5, variance)
    t = drawn.t
    assert t.shape == got.kl.shape == (600, num_draws)
    assert t.min() >= 1 and t.max() <= 99
    difference = got.kl.sum(1) - right.kl.sum(1)
    error = difference.std() / len(x_0) ** 0.5
    assert difference.mean().abs() < 4 * error
    assert error < 0.05 * right.kl.sum(1).mean()
    torch.testing.assert_close(got.prior, right.prior)
    # The estimate of each single t is unbiased too.
    ours = sums_by_t(t, got.kl)[1:]
    theirs = right.kl.mean(0)
    for half in (slice(49), slice(49, None)):
        assert ours[half].sum().item() == pytest.approx(theirs[half].sum().item(), rel=0.2)


def test_the_average_estimate_over_all_u_is_the_exact_bound():
    """With an x_0_hat that depends only on t, only t is random: the average over u is the sum over t."""

    def denoise(x_t, t):
        return Denoised(torch.ones_like(x_t) * (t / 100).view(-1, 1, 1, 1).double(), x_t)

    x_0 = torch.full((5_000, 1, 1, 1), -1.0, dtype=torch.float64)
    right = exact(denoise, LINEAR, x_0[:2], normal((2, 1, 1, 1)))
    u = (torch.arange(len(x_0)) + 0.5).double() / len(x_0)
    drawn = draw_timesteps(LINEAR, proposal(right.kl), u, 3)
    got = estimated(denoise, LINEAR, x_0, drawn)
    torch.testing.assert_close(sums_by_t(drawn.t, got.kl)[1:], right.kl[0], rtol=0.08, atol=0)
    torch.testing.assert_close(total(got).mean(), total(right).mean(), rtol=1e-4, atol=0)


def test_clipping_is_that_of_the_sampler():
    x_0 = grey((2, 1, 4, 4), 0, 0.3)
    noise = normal((2, 1, 4, 4))
    totals = [
        total(
            exact(lambda x_t, t, value=value: Denoised(torch.full_like(x_t, value), x_t), LINEAR, x_0, noise)
        )
        for value in (1.0, 3.0)
    ]
    torch.testing.assert_close(*totals)


def test_importance_sampling_errs_less_than_uniform():
    x_0 = grey((400, 1, 4, 4), 0.2, 0.4)
    denoise = gaussian(COSINE, 0.2, 0.4)
    u = torch.rand(400, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    pilot = exact(denoise, COSINE, x_0[:8], normal(x_0[:8].shape, 3)).kl
    importance, uniform = (
        estimated(denoise, COSINE, x_0, draw_timesteps(COSINE, proposal(kl), u, 2)).kl.sum(1).std()
        for kl in (pilot, torch.ones_like(pilot))
    )
    assert importance < 0.7 * uniform


def test_a_proposal_follows_the_errors_of_the_pilot():
    kl = torch.tensor([[3.0, 0.0, 1.0]] * 2, dtype=torch.float64)
    expected = torch.tensor([0, 0.675 + 0.1 / 3, 0.1 / 3, 0.225 + 0.1 / 3], dtype=torch.float64)
    torch.testing.assert_close(proposal(kl), expected)


def test_one_timestep_has_no_kl():
    one = schedules.linear(1, 0.1, 0.1)
    x_0 = grey((2, 1, 4, 4), 0, 0.3)
    for variance in ("beta", "beta_tilde"):
        bound = exact(some_denoiser, one, x_0, normal(x_0.shape), variance)
        assert bound.kl.shape == (2, 0)
        torch.testing.assert_close(total(bound), bound.prior + bound.decoder)


def test_in_many_small_steps_the_sum_of_kl_is_that_of_continuous_time():
    """In nats per dimension; for N(0, v) it is log((1 + v snr_0) / (1 + v snr_T)) / 2.

    The sum is above it, by half a step of log SNR (0.004) here, and by 11 % in 1,000 steps of `linear`.
    """
    v = 0.25**2
    alpha_bar = torch.linspace(7, -7, 1751, dtype=torch.float64).sigmoid()
    fine = schedules.Schedule(1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]]))
    known = 0.5 * (torch.log1p(v * fine.snr[0]) - torch.log1p(v * fine.snr[-1])).item()
    x_0 = grey((64, 1, 8, 8), 0.0, 0.25).float()
    noise = normal((64, 1, 8, 8), dtype=torch.float32)
    bound = exact(gaussian(fine, 0.0, 0.25), fine, x_0, noise)
    assert bound.kl.sum(1).mean().item() * math.log(2) == pytest.approx(known, rel=0.02)


def test_the_decoder_of_images_in_another_range_is_that_of_images_in_minus_one_to_one():
    x_0 = grey((6, 1, 4, 4), 0, 0.4)
    x_0_hat = 0.9 * x_0 + 0.01
    log_variance = torch.linspace(-9, -4, len(x_0), dtype=torch.float64)
    right = likelihood.decoder_nll(x_0, x_0_hat, log_variance)
    got = likelihood.decoder_nll(2.5 * x_0, 2.5 * x_0_hat, log_variance + 2 * math.log(2.5), 2.5)
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"grey levels in \[-2.5, 2.5\]"):
        likelihood.decoder_nll(x_0 + 1.7, x_0_hat, log_variance, 2.5)
