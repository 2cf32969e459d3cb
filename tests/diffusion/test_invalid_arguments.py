"""Every function refuses what it cannot take, and names the parameter and what would be right."""

from functools import partial

import pytest
import torch
from support.exact_denoisers import ancestral, grey, normal, toy_denoiser

from ddpm.build import bind_sampler
from ddpm.config import kinds
from ddpm.config.tree import SampleConfig
from ddpm.diffusion import likelihood, process, samplers, schedules
from ddpm.diffusion.guidance import guided
from ddpm.diffusion.objectives import Eps, LabelConditioning, UniformMix
from ddpm.diffusion.reverse import fixed_variance
from ddpm.diffusion.samplers import ddim, dpmpp_2m, heun, mix
from ddpm.diffusion.schedules import Schedule
from ddpm.diffusion.timesteps import karras, quadratic, respaced, uniform
from ddpm.utils.generators import PhiloxGenerator

LINEAR = schedules.linear(100, 1e-3, 0.2)
TOY = toy_denoiser(LINEAR)
A = LINEAR.alpha_bar
X = torch.zeros(2, 1, 2, 2)
T = torch.zeros(2, dtype=torch.int64)
NOISE = normal((2, 1, 4, 4))
GREY = grey((2, 1, 4, 4), 0, 0.3)
TEN = uniform(100, 10)
BETA = fixed_variance(LINEAR, "beta")
PROPOSALS = [torch.full((100,), 0.01).double(), torch.zeros(100).double(), torch.ones(3)]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


SCHEDULES = [
    (lambda: schedules.linear(0, 1e-4, 0.02), r"num_timesteps is 0; .* 1, 2"),
    (lambda: schedules.linear(10, 0.0, 0.02), r"beta_start is 0.0; .* \(0, 1\)"),
    (lambda: schedules.scaled_linear(10, 0.02, 0.01), r"beta_end is 0.01; .* beta_start being 0.02"),
    (lambda: schedules.linear(10, 1e-4, 1.0), r"beta_end is 1.0"),
    (lambda: schedules.cosine(10, cosine_s=-1), r"cosine_s is -1; .* \[0, 1\]"),
    (lambda: schedules.cosine(10, max_beta=1.0), r"max_beta is 1.0; .* \(0, 1\)"),
    (lambda: schedules.sigmoid(10, sigmoid_start=3, sigmoid_end=3), r"sigmoid_start is 3; .* below"),
    (lambda: schedules.sigmoid(10, sigmoid_tau=0.0), r"sigmoid_tau is 0.0"),
    (lambda: schedules.sigmoid(0), r"num_timesteps is 0"),
    (lambda: schedules.geometric(0, 0.002, 80), r"num_timesteps is 0"),
    (lambda: schedules.geometric(10, 80, 80), r"sigma_min is 80; .* \(0, sigma_max\), sigma_max being 80"),
    (lambda: schedules.linear(10, float("nan"), 0.02), r"beta_start is nan"),
    (lambda: Schedule(torch.full((4,), 0.1)), r"beta is torch.float32 .* float64 \[T\]"),
    (lambda: Schedule(double(0.1, 1.0)), r"every beta must be in \(0, 1\)"),
    (lambda: Schedule(double(*[0.999] * 200)), r"alpha_bar .* inside \(0, 1\)"),
    (lambda: Schedule(double(*[1e-18] * 4)), r"alpha_bar .* inside \(0, 1\)"),
]
PROCESS = [
    (lambda: process.q_sample(A, X, T, X[:1]), r"eps has shape \(1, 1, 2, 2\); .* x_0"),
    (lambda: process.v_from(A, X, T, X[:, :, :1]), "eps has shape"),
    (lambda: process.predict_x_0_from_v(A, X, T, X[:1]), "v has shape"),
    (lambda: process.mix(X, torch.ones(2), X[:1]), "u has shape"),
    (lambda: process.posterior_mean(LINEAR, X[:1], X, T), "x_0 has shape"),
    (lambda: process.q_sample(A, X, T[:1], X), r"t is torch.int64 \(1,\); .* \(2,\)"),
    (lambda: process.q_sample(A, X, T.float(), X), "t is torch.float32"),
    # With bfloat16 tables several timesteps carry exactly no noise.
    (lambda: process.q_sample(A, X.bfloat16(), T, X.bfloat16()), "needs float32 or float64"),
    (lambda: process.q_sample(A, X.half(), T, X.half()), "needs float32 or float64"),
]
OBJECTIVES = [
    (lambda: LabelConditioning(0, 1.1), "label_dropout is 1.1"),
    (lambda: LabelConditioning(-1), "num_classes is -1"),
    (lambda: Eps(LINEAR, min_snr_gamma=0.0), "min_snr_gamma is 0.0"),
    (lambda: Eps(LINEAR, sigma_data=0.0), "sigma_data is 0.0"),
    (
        lambda: Eps(LINEAR, learns_variance=True, log_sigma=(0.0, 1.0)),
        "variance is learned .*; timesteps must be uniform",
    ),
    (
        lambda: Eps(LINEAR).loss(lambda x, t, y: x[..., :1], X, None, PhiloxGenerator(0)),
        r"model returned shape \(2, 1, 2, 1\)",
    ),
    (
        lambda: UniformMix().denoise(lambda x, t, y: x, X, T, None),
        "t is torch.int64; for UniformMix it is the amount",
    ),
]
TIMESTEPS = [
    (lambda: uniform(100, 101), r"num_sample_steps is 101; it must be in 1..100"),
    (lambda: quadratic(100, 0), "num_sample_steps is 0"),
    (lambda: karras(LINEAR, -3), "num_sample_steps is -3"),
    (lambda: karras(LINEAR, 10, rho=0.9), r"rho is 0.9; it must be in \[1, inf\)"),
    (lambda: karras(LINEAR, 10, rho=float("nan")), "rho is nan"),
    (lambda: karras(LINEAR, 10, sigma_min=-0.1), r"sigma_min is -0.1; it must be in \[0, 80\)"),
    (lambda: karras(LINEAR, 10, sigma_min=80.0), "sigma_min is 80.0"),
    (lambda: karras(LINEAR, 10, sigma_max=0.0), r"sigma_max is 0.0; it must be in \(0, inf\]"),
    (lambda: respaced(LINEAR, [3, 3]), r"timesteps are \[3, 3\]; they must fall, within 99..0"),
    (lambda: respaced(LINEAR, [100]), "timesteps are"),
    (lambda: respaced(LINEAR, []), "timesteps are"),
]
DENOISERS = [
    (lambda: guided(TOY, TOY, 2.0, (1.0, 1.0)), r"guidance_interval is \(1.0, 1.0\)"),
    (lambda: guided(TOY, TOY, 1.0, (-1.0, 1.0)), r"guidance_interval is \(-1.0, 1.0\)"),
]
SAMPLERS = [
    (partial(ddim, TOY, LINEAR, NOISE, timesteps=TEN, eta=-0.1), "eta is -0.1"),
    (partial(dpmpp_2m, TOY, LINEAR, NOISE, timesteps=TEN, eta=1.1), "eta is 1.1"),
    (partial(ddim, TOY, LINEAR, NOISE, timesteps=[5, 5]), "timesteps are .* must fall"),
    (partial(heun, TOY, LINEAR, NOISE, timesteps=[100, 0]), r"timesteps are \[100, 0\]; .* within 99..0"),
    (partial(dpmpp_2m, TOY, LINEAR, NOISE, timesteps=[0, -1]), "timesteps are"),
    (
        partial(ancestral, TOY, LINEAR, NOISE, variance="learned"),
        "variance is 'learned', but this net did not",
    ),
    (
        partial(samplers.ancestral, TOY, LINEAR, NOISE, timesteps=TEN, variance=BETA),
        r"variance has shape \(100,\); it must be \[10\]",
    ),
    (partial(mix, TOY, NOISE, num_sample_steps=0), "num_sample_steps is 0"),
]
LIKELIHOOD = [
    (partial(likelihood.exact, TOY, LINEAR, GREY + 1e-3, NOISE, BETA), "256 grey levels"),
    (
        partial(likelihood.exact, TOY, LINEAR, GREY, NOISE, None),
        "variance is 'learned', but this net did not",
    ),
    (partial(fixed_variance, LINEAR, "measured"), "variance is 'measured'; that needs the error"),
    (partial(fixed_variance, LINEAR, "wide"), "variance is 'wide'; it must be"),
    (partial(likelihood.posterior_kl, LINEAR, GREY, T, GREY, torch.zeros(2)), "t has a 0"),
    *[(partial(likelihood.draw_timesteps, LINEAR, p, X, 1), "proposal must be") for p in PROPOSALS],
    (partial(likelihood.draw_timesteps, LINEAR, BETA, X, 0), "num_draws is 0"),
]


@pytest.mark.parametrize(
    ("call", "message"),
    [*SCHEDULES, *PROCESS, *OBJECTIVES, *TIMESTEPS, *DENOISERS, *SAMPLERS, *LIKELIHOOD],
)
def test_invalid_arguments_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("sampler", "changes", "message"),
    [
        ("ddim", {"num_sample_steps": 101}, r"num_sample_steps is 101; .* 1..100"),
        ("ddim", {"num_sample_steps": 0}, "num_sample_steps is 0"),
        ("ddim", {"eta": 1.5}, r"eta is 1.5; .* \[0, 1\]"),
        ("dpmpp_2m", {"eta": -0.5}, r"eta is -0.5; .* \[0, 1\]"),
        ("mix", {"num_sample_steps": 0}, "num_sample_steps is 0; .* 1, 2"),
        ("ddpm", {}, "variance is 'auto'; it must be beta, beta_tilde or measured"),
        ("heun", {"spacing": "log"}, "spacing is 'log'"),
        ("heun", {"spacing": "karras", "rho": 0.5}, "rho is 0.5"),
    ],
)
def test_a_sampler_is_checked_before_sampling(sampler, changes, message):
    with pytest.raises(ValueError, match=message):
        sample = SampleConfig(sampler=sampler, **changes)
        bind_sampler(kinds.sampler(sampler).load(), sample, LINEAR, 64)
