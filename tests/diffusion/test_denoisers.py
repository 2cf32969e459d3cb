"""Guidance and thresholds: known answers, and x_t stays consistent with x_0_hat and eps_hat."""

import pytest
import torch
from support.exact_denoisers import gaussian, normal, toy_denoiser

from ddpm.config import SampleConfig
from ddpm.diffusion import process, schedules
from ddpm.diffusion.denoisers import build_threshold, clip, dynamic, guided, predict
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.samplers import ancestral, mix

SHORT = schedules.linear(100, 1e-3, 0.2)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_extrapolates_and_stays_consistent(scale):
    cond, uncond = gaussian(SHORT, 0.5, 0.2), gaussian(SHORT, 0.0, 0.5)
    x_t, t = normal((3, 1, 4, 4))(), torch.tensor([0, 50, 99])
    x_0_hat, eps_hat, _ = guided(cond, uncond, scale)(x_t, t)
    c, u = cond(x_t, t).eps_hat, uncond(x_t, t).eps_hat
    torch.testing.assert_close(eps_hat, (1 - scale) * u + scale * c)
    torch.testing.assert_close(process.q_sample(SHORT.alpha_bar, x_0_hat, t, eps_hat), x_t)


def unused(x_t, t):
    raise AssertionError("the unconditional net was called")


def test_guidance_with_scale_one_calls_only_one_net():
    cond = gaussian(SHORT, 0.5, 0.2)
    x = ancestral(guided(cond, unused, 1.0), SHORT, normal((2, 1, 2, 2)))
    assert torch.equal(x, ancestral(cond, SHORT, normal((2, 1, 2, 2))))


def test_guidance_acts_inside_its_interval_image_by_image():
    """For low < sigma <= high; elsewhere the prediction is bitwise the conditional one."""
    cond, uncond = gaussian(SHORT, 0.5, 0.2), gaussian(SHORT, 0.0, 0.5)
    interval = SHORT.sigma[20].item(), SHORT.sigma[60].item()
    denoise = guided(cond, uncond, 3.0, interval, lambda t: SHORT.sigma[t])
    everywhere = guided(cond, uncond, 3.0)
    x_t, t = normal((6, 1, 4, 4))(), torch.tensor([0, 20, 21, 60, 61, 99])
    for ours, inside, outside in zip(
        denoise(x_t, t)[:2], everywhere(x_t, t)[:2], cond(x_t, t)[:2], strict=True
    ):
        assert torch.equal(ours[2:4], inside[2:4])
        assert torch.equal(ours[[0, 1, 4, 5]], outside[[0, 1, 4, 5]])
        assert not torch.equal(inside, outside)


def test_outside_its_interval_guidance_calls_only_one_net():
    calls = []

    def uncond(x_t, t):
        calls.append(int(t[0]))
        return gaussian(SHORT, 0.0, 0.5)(x_t, t)

    interval = SHORT.sigma[20].item(), SHORT.sigma[60].item()
    denoise = guided(gaussian(SHORT, 0.5, 0.2), uncond, 3.0, interval, lambda t: SHORT.sigma[t])
    ancestral(denoise, SHORT, normal((2, 1, 2, 2)))
    assert calls == list(range(60, 20, -1))
    x_t, t = normal((1, 1, 2, 2))(), torch.tensor([5])
    whole = guided(
        gaussian(SHORT, 0.5, 0.2), gaussian(SHORT, 0.0, 0.5), 3.0, (0.0, 1e9), lambda t: SHORT.sigma[t]
    )
    plain = guided(gaussian(SHORT, 0.5, 0.2), gaussian(SHORT, 0.0, 0.5), 3.0)
    assert torch.equal(whole(x_t, t).x_0_hat, plain(x_t, t).x_0_hat)


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


def test_dynamic_thresholding_follows_imagen():
    """Of 100 values the largest is 4 and the quantile 0.9 is 2: what exceeds 2 becomes 1, all else is halved."""
    x = torch.linspace(0, 1, 90).double()
    large = torch.cat([x[:89], torch.full((5,), 2.0), torch.full((5,), -2.0), torch.tensor([4.0])]).double()
    small = 0.2 * large
    x_0_hat = torch.stack([large, small]).view(2, 1, 10, 10)
    ours = dynamic(0.9)(x_0_hat).flatten(1)
    torch.testing.assert_close(ours[0], (large / 2).clamp(-1, 1))
    assert torch.equal(
        ours[1], small
    )  # its quantile is below 1: it is only clipped, and there is nothing to clip
    # Each image is treated by itself, whatever its batch.
    assert torch.equal(dynamic(0.9)(x_0_hat[:1]).flatten(), ours[0])
    assert dynamic(1.0)(x_0_hat).abs().max() == 1


def test_dynamic_thresholding_equals_that_of_diffusers():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=1e9)
    x_0_hat = 3 * normal((4, 3, 8, 8), dtype=torch.float32)()
    torch.testing.assert_close(dynamic(0.8)(x_0_hat), theirs._threshold_sample(x_0_hat))


@pytest.mark.parametrize("threshold", [clip, dynamic(0.9), None])
def test_a_prediction_stays_consistent_after_any_threshold(threshold):
    x_t = normal((3, 2, 4, 4))()
    x_0_hat, eps_hat, _ = predict(toy_denoiser(SHORT), SHORT, x_t, 70, threshold)
    t = torch.full((3,), 70)
    torch.testing.assert_close(process.q_sample(SHORT.alpha_bar, x_0_hat, t, eps_hat), x_t)
    raw = toy_denoiser(SHORT)(x_t, t).x_0_hat
    assert raw.abs().max() > 1
    assert torch.equal(x_0_hat, threshold(raw) if threshold else raw)


def test_build_threshold():
    def built(**changes):
        return build_threshold(SampleConfig(**changes))

    assert built(sampler="heun") is clip and built(sampler="heun", clip_x_0=False) is None
    assert built(sampler="ddpm", clip_x_0=False) is clip
    assert built(sampler="ddpm", mean="plain") is None
    x = normal((2, 1, 4, 4))()
    for sampler in ("ddpm", "ddim"):
        assert torch.equal(built(sampler=sampler, dynamic_threshold=0.7)(x), dynamic(0.7)(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dynamic(0.0), r"dynamic_threshold is 0.0; it must be in \(0, 1\]"),
        (lambda: dynamic(1.1), "dynamic_threshold is 1.1"),
        (lambda: guided(unused, unused, 2.0, (1.0, 1.0)), r"guidance_interval is \(1.0, 1.0\)"),
        (lambda: guided(unused, unused, 1.0, (-1.0, 1.0)), r"guidance_interval is \(-1.0, 1.0\)"),
    ],
)
def test_invalid_arguments_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
