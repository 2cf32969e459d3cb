"""Guidance and thresholds: known answers, and x_t stays consistent with x_0_hat and eps_hat."""

import pytest
import torch
from support.exact_denoisers import ancestral, gaussian, normal, toy_denoiser

from ddpm.diffusion import process, schedules
from ddpm.diffusion.guidance import clip, guided, predict
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.samplers import mix

SHORT = schedules.linear(100, 1e-3, 0.2)
COND = gaussian(SHORT, 0.5, 0.2)
UNCOND = gaussian(SHORT, 0.0, 0.5)
INTERVAL = SHORT.sigma[20].item(), SHORT.sigma[60].item()


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_extrapolates_and_stays_consistent(scale):
    x_t = normal((3, 1, 4, 4))()
    t = torch.tensor([0, 50, 99])
    x_0_hat, eps_hat, _ = guided(COND, UNCOND, scale)(x_t, t)
    c = COND(x_t, t).eps_hat
    u = UNCOND(x_t, t).eps_hat
    torch.testing.assert_close(eps_hat, (1 - scale) * u + scale * c)
    torch.testing.assert_close(process.q_sample(SHORT.alpha_bar, x_0_hat, t, eps_hat), x_t)


def unused(x_t, t):
    raise AssertionError("the unconditional net was called")


def test_guidance_with_scale_one_calls_only_one_net():
    assert guided(COND, unused, 1.0) is COND


def test_guidance_acts_inside_its_interval_image_by_image():
    """For low < sigma <= high; elsewhere the prediction is bitwise the conditional one."""
    denoise = guided(COND, UNCOND, 3.0, INTERVAL, lambda t: SHORT.sigma[t])
    everywhere = guided(COND, UNCOND, 3.0)
    x_t = normal((6, 1, 4, 4))()
    t = torch.tensor([0, 20, 21, 60, 61, 99])
    predictions = (net(x_t, t)[:2] for net in (denoise, everywhere, COND))
    for ours, inside, outside in zip(*predictions, strict=True):
        assert torch.equal(ours[2:4], inside[2:4])
        assert torch.equal(ours[[0, 1, 4, 5]], outside[[0, 1, 4, 5]])
        assert not torch.equal(inside, outside)


def test_outside_its_interval_guidance_calls_only_one_net():
    calls = []

    def uncond(x_t, t):
        calls.append(int(t[0]))
        return UNCOND(x_t, t)

    denoise = guided(COND, uncond, 3.0, INTERVAL, lambda t: SHORT.sigma[t])
    ancestral(denoise, SHORT, normal((2, 1, 2, 2)))
    assert calls == list(range(60, 20, -1))


def test_the_interval_of_mix_is_about_the_amount():
    """Four steps, amounts 1, 0.75, 0.5, 0.25; guidance at 0.75 and 0.5."""
    seen = []
    denoise = guided(
        lambda x_t, t: Denoised(torch.full_like(x_t, 0.25), x_t),
        lambda x_t, t: Denoised(torch.zeros_like(x_t), x_t),
        2.0,
        (0.25, 0.75),
    )
    mix(
        denoise,
        normal((1, 1, 2, 2)),
        num_sample_steps=4,
        on_step=lambda step, x_t, x_0_hat: seen.append(x_0_hat.mean().item()),
    )
    assert seen == [0.25, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("threshold", [clip, None])
def test_a_prediction_stays_consistent_after_any_threshold(threshold):
    x_t = normal((3, 2, 4, 4))()
    x_0_hat, eps_hat, _ = predict(toy_denoiser(SHORT), SHORT, x_t, 70, threshold)
    t = torch.full((3,), 70)
    torch.testing.assert_close(process.q_sample(SHORT.alpha_bar, x_0_hat, t, eps_hat), x_t)
    raw = toy_denoiser(SHORT)(x_t, t).x_0_hat
    assert raw.abs().max() > 1
    assert torch.equal(x_0_hat, threshold(raw) if threshold else raw)
