"""The numbers that diffusers' own tests expect, reproduced by our schedules, formulas and samplers.

Each literal is from diffusers, tests/schedulers (Apache 2.0): its linear schedule of 1,000 steps from 1e-4 to 0.02, the
net `x_t t / (t + 1)`, and as x_T the numbers 0/768 ... 767/768. The literals are the sum of the absolute values, to
0.01, and their mean.

Not reproduced, and why:

- test_scheduler_ddpm, with noise (387.9466): diffusers computes beta_1 = 1 - alpha_bar_1 / alpha_bar_0 in float32. Ours
  is 387.9672, and so is theirs where its tables are float64.
- test_scheduler_heun (0.1233), _euler (10.0807) and the others that scale the net's input: their loop steps on from the
  scaled x, so that it shrinks with every step. Where it does not, theirs is 244.602 and 168.052, and ours 244.573 and
  168.072, at whole timesteps.
- test_scheduler_dpm_multi with karras (0.2096) and lu (0.1554): they visit sigma between two timesteps;
  ours visits whole timesteps.
- DEIS, LMS, PNDM, SA-Solver, UniPC, DPM-Solver singlestep, DPM-Solver SDE, TCD, LCM, EDM: samplers that are not here.
"""

import pytest
import torch
from support.exact_denoisers import ancestral, visited

from ddpm.diffusion import process, schedules
from ddpm.diffusion.guidance import clip
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.samplers import ddim, dpmpp_2m
from ddpm.diffusion.timesteps import respaced

LINEAR = schedules.linear(1000, 1e-4, 0.02)
BRIGHT = schedules.linear(1000, 0.01, 0.02)
"""Its first alpha is 0.99, so the result depends on the target of the last step."""
TEN = range(900, -1, -100)
ELEVEN = (999, 899, 799, 699, 599, 500, 400, 300, 200, 100, 0)
COUNT = torch.arange(768) / 768
SAMPLE = COUNT.reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
NOISE = COUNT.flip(0).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def eps_net(schedule):
    def denoise(x_t, t):
        eps_hat = x_t * (t / (t + 1)).view(-1, 1, 1, 1)
        return Denoised(process.predict_x_0_from_eps(schedule.alpha_bar, x_t, t, eps_hat), eps_hat)

    return denoise


def v_net(schedule):
    def denoise(x_t, t):
        v_hat = x_t * (t / (t + 1)).view(-1, 1, 1, 1)
        x_0_hat = process.predict_x_0_from_v(schedule.alpha_bar, x_t, t, v_hat)
        return Denoised(x_0_hat, process.predict_eps_from_v(schedule.alpha_bar, x_t, t, v_hat))

    return denoise


def from_sample(x=SAMPLE):
    """A noise source: first `x`, then the draws of diffusers' generator."""
    generator = torch.Generator().manual_seed(0)
    first = [x]
    return lambda: first.pop() if first else torch.randn(SAMPLE.shape, generator=generator)


def noised(t):
    return process.q_sample(LINEAR.alpha_bar, SAMPLE, torch.full((4,), t), NOISE)


def assert_sums(x, absolute_sum, absolute_mean):
    assert x.abs().sum().item() == pytest.approx(absolute_sum, abs=0.01)
    assert x.abs().mean().item() == pytest.approx(absolute_mean, abs=1e-4)


@pytest.mark.parametrize(("net", "golden"), [(eps_net, (258.9606, 0.3372)), (v_net, (202.0296, 0.2631))])
def test_ddpm(net, golden):
    """test_scheduler_ddpm, test_full_loop_no_noise (which is not without noise) and _with_v_prediction."""
    assert_sums(ancestral(net(LINEAR), LINEAR, from_sample()), *golden)


def test_ddpm_variance():
    """test_scheduler_ddpm and test_scheduler_ddim, test_variance."""
    assert LINEAR.posterior_variance[[0, 487, 999]].tolist() == pytest.approx([0, 0.00979, 0.02], abs=1e-5)
    for t, t_prev, golden in [
        (420, 400, 0.14771),
        (980, 960, 0.32460),
        (487, 486, 0.00979),
        (999, 998, 0.02),
    ]:
        jump = respaced(LINEAR, [t, t_prev])
        assert jump.posterior_variance[1].item() == pytest.approx(golden, abs=1e-5)


def test_one_step_of_a_batch_with_different_t():
    """test_scheduler_ddpm_parallel and test_scheduler_ddim_parallel, test_batch_step_no_noise."""
    x_t = torch.cat([SAMPLE, SAMPLE + 0.1, SAMPLE - 0.1])
    t = torch.arange(3).repeat_interleave(4)
    x_0_hat = clip(eps_net(LINEAR)(x_t, t).x_0_hat)
    assert_sums(process.posterior_mean(LINEAR, x_0_hat, x_t, t), 1153.1833, 0.5005)
    assert_sums(x_0_hat, 1147.7904, 0.4982)  # ddim in ten steps goes from t = 0, 1, 2 below 0


@pytest.mark.parametrize(("net", "golden"), [(eps_net, (172.0067, 0.223967)), (v_net, (52.5302, 0.0684))])
def test_ddim(net, golden):
    """test_scheduler_ddim, test_full_loop_no_noise and _with_v_prediction."""
    assert_sums(ddim(net(LINEAR), LINEAR, from_sample(), timesteps=TEN), *golden)


def test_ddim_from_a_noised_image():
    """test_scheduler_ddim, test_full_loop_with_noise."""
    assert_sums(ddim(eps_net(LINEAR), LINEAR, from_sample(noised(100)), timesteps=(100, 0)), 354.5418, 0.4616)


def test_ddim_to_a_clean_image_and_to_t_0():
    """test_scheduler_ddim, _with_set_alpha_to_one, which is ours, and _with_no_set_alpha_to_one.

    The latter ends at t = 0, with the input of our last step.
    """
    *_, at_t_0, x = visited(ddim, eps_net(BRIGHT), BRIGHT, from_sample(), timesteps=TEN)
    assert_sums(x, 149.8295, 0.1951)
    assert_sums(at_t_0, 149.0784, 0.1941)


@pytest.mark.parametrize(
    ("net", "threshold", "golden"),
    [
        (eps_net, None, 0.3301),
        (v_net, None, 0.2251),
        # A quantile held between 1 and sample_max_value = 0.5 is 0.5.
        (eps_net, lambda x_0_hat: x_0_hat.clamp(-0.5, 0.5) / 0.5, 1.1364),
    ],
    ids=["eps", "v", "threshold"],
)
def test_dpmpp_2m(net, threshold, golden):
    """test_scheduler_dpm_multi, test_full_loop_no_noise, _with_v_prediction, _no_noise_thres.

    Theirs ends at t = 0 (final_sigmas_type sigma_min), with the input of our last step.
    """
    x = last_entered(net, from_sample(), ELEVEN, threshold)
    assert x.abs().mean().item() == pytest.approx(golden, abs=1e-4)


def test_dpmpp_2m_from_a_noised_image():
    """test_scheduler_dpm_multi, test_full_loop_with_noise."""
    assert_sums(last_entered(eps_net, from_sample(noised(500)), ELEVEN[5:], None), 318.4111, 0.4146)


def last_entered(net, noise, timesteps, threshold):
    return visited(dpmpp_2m, net(LINEAR), LINEAR, noise, timesteps=timesteps, threshold=threshold)[-2]
