"""RePaint: known pixels stay, sampled pixels fit to them, and each step equals that of diffusers."""

import sys
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler
from PIL import Image
from support import examples
from support.exact_denoisers import (
    ancestral,
    black_and_white,
    correlated,
    finite,
    gaussian,
    normal,
    toy_denoiser,
    visited,
)
from support.tiny import TINY_NET

from ddpm.build import TrainedNet, build_net
from ddpm.config.json import override
from ddpm.diffusion import schedules
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.samplers import PerImageNoise
from ddpm.diffusion.timesteps import karras, uniform
from ddpm.runs import checkpoint
from ddpm.utils.errors import UserError
from ddpm.utils.generators import PhiloxGenerator

repaint = examples.load("inpainting", "inpaint")
Known = repaint.Known
inpaint = repaint.inpaint
SHORT = schedules.linear(100, 1e-3, 0.2)
TOY = toy_denoiser(SHORT)
ALL = uniform(100, 100)


def make_mask(shape, seed=5):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5).float()


@pytest.mark.parametrize("num_resamples", [1, 3])
def test_known_pixels_are_kept_exactly(num_resamples):
    shape = (3, 2, 4, 4)
    x_0 = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 1
    mask = make_mask((1, 1, 4, 4))
    given = Known(x_0, mask, num_resamples)
    noise = normal(shape, dtype=torch.float32)
    x = inpaint(TOY, SHORT, noise, known=given, timesteps=uniform(100, 20))
    known = mask.bool().expand(shape)
    assert torch.equal(x[known], x_0[known])
    assert not (x[~known] == x_0[~known]).any()


@pytest.mark.parametrize("timesteps", [ALL, karras(SHORT, 12)], ids=len)
def test_with_nothing_known_and_no_resampling_it_is_ancestral(timesteps):
    shape = (2, 1, 4, 4)
    zero = torch.zeros(1, 1, 4, 4)
    x = inpaint(TOY, SHORT, normal(shape), known=Known(zero, zero, 1), timesteps=timesteps)
    assert torch.equal(x, ancestral(TOY, SHORT, normal(shape), timesteps=timesteps))


def test_samples_have_the_conditional_mean():
    """Two pixels of N(0, s^2) with correlation rho: given the one, a, the other is N(rho a, s^2 (1 - rho^2)).

    RePaint is an approximation: more resampling improves the mean, but the spread stays slightly too small.
    """
    s = 0.3
    rho = 0.9
    a = 0.4
    covariance = s**2 * torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)
    schedule = schedules.linear(200, 5e-4, 0.1)
    x_0 = torch.tensor([[[[a, 0.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]]])
    means = []
    for num_resamples in (1, 3, 10):
        settings = {"known": Known(x_0, mask, num_resamples, 2), "timesteps": uniform(200, 200)}
        noise = normal((1000, 1, 1, 2))
        x = inpaint(correlated(schedule, covariance), schedule, noise, **settings, threshold=None)
        means.append(x[:, 0, 0, 1].mean().item())
    assert means[0] < means[1] - 0.02 < means[2] - 0.04
    assert means[2] == pytest.approx(rho * a, abs=0.02)  # known to 0.004
    assert x[..., 1].std().item() == pytest.approx(s * (1 - rho**2) ** 0.5, rel=0.15)


def test_inpainting_finds_the_matching_point_of_a_finite_data_set():
    points = black_and_white()
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :] = 1
    settings = {"known": Known(points[2:3], mask), "timesteps": uniform(100, 50)}
    x = inpaint(finite(SHORT, points), SHORT, normal((50, 1, 4, 4)), **settings)
    assert ((x - points[2]).abs() < 1e-3).all()


def reference_steps(n, num_resamples, jump_length):
    """The step sequence of Lugmayr et al., as pairs of timesteps (from, to); -1 is the finished image.

    Downwards the net is evaluated at the first timestep, and x_t moves to the second; upwards noise is added. It
    differs from diffusers, whose pipeline evaluates the net at the second timestep of its copy of get_schedule_jump.
    """
    left = dict.fromkeys(range(0, n - jump_length, jump_length), num_resamples - 1)
    t = n
    visited = []
    while t >= 1:
        t -= 1
        visited.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            visited += range(t + 1, t + jump_length + 1)
            t += jump_length
    return list(pairwise([*visited, -1]))


def test_reference_steps_by_hand():
    """Four steps, jumps of two, each once: from 0 up to 2; a jump from 2 would end above 3."""
    down = [(3, 2), (2, 1), (1, 0)]
    assert reference_steps(4, 2, 2) == [*down, (0, 1), (1, 2), (2, 1), (1, 0), (0, -1)]


@pytest.mark.parametrize(
    ("n", "num_resamples", "jump_length"),
    [(100, 10, 10), (100, 1, 10), (100, 3, 1), (25, 2, 10), (12, 3, 11), (2, 4, 1)],
)
def test_steps_go_back_and_forth_as_in_the_authors_code(n, num_resamples, jump_length):
    asked = []

    def denoise(x_t, t):
        asked.append(int(t[0]))
        return Denoised(torch.zeros_like(x_t), x_t)

    # If all pixels are known and grey, x_t is pure noise, and the std of 10,000 pixels tells its timestep.
    schedule = schedules.linear(n, 0.05, 0.3)
    zero = torch.zeros(1, 1, 1, 1)
    noise = normal((1, 1, 100, 100), dtype=torch.float32)
    known = Known(zero, zero + 1, num_resamples, jump_length)
    *seen, _ = visited(inpaint, denoise, schedule, noise, known=known, timesteps=range(n)[::-1])
    down = [t for t, t_next in reference_steps(n, num_resamples, jump_length) if t_next < t]
    assert asked == down and asked.count(0) == 1
    assert len(asked) == n + (num_resamples - 1) * jump_length * len(range(0, n - jump_length, jump_length))
    std = (1 - schedule.alpha_bar[asked]).sqrt().tolist()
    assert [x_t.std().item() for x_t in seen[1:]] == pytest.approx(std[1:], rel=0.04)  # known to 0.7 %


@pytest.mark.parametrize("num_resamples", [2, 3])
def test_repaint_equals_diffusers_step_for_step(num_resamples):
    """diffusers' step and undo_step in the order of the reference steps; undo_step adds noise one step at a time."""
    shape = (2, 1, 4, 4)
    x_0 = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
    mask = make_mask((1, 1, 4, 4))
    theirs = RePaintScheduler(num_train_timesteps=100, eta=1.0, clip_sample=False)
    theirs.alphas_cumprod = SHORT.alpha_bar
    theirs.betas = SHORT.beta
    theirs.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(100)
    g = torch.Generator().manual_seed(0)
    y = torch.randn(shape, generator=g, dtype=torch.float64)
    expected = []
    for t, t_next in reference_steps(100, num_resamples, 1):
        if t_next < t:
            expected.append(y)
            y = theirs.step(TOY(y, torch.full((2,), t)).eps_hat, t, y, x_0, mask.double(), g).prev_sample
        else:
            y = theirs.undo_step(y, t_next, g)  # which adds beta of the timestep that y goes to
    settings = {"known": Known(x_0, mask, num_resamples, 1), "timesteps": ALL, "threshold": None}
    ours = visited(inpaint, TOY, SHORT, normal(shape), **settings)
    torch.testing.assert_close(ours, [*expected, y], rtol=1e-8, atol=1e-8)


def test_an_image_depends_only_on_its_seed():
    known = Known(torch.zeros(1, 3, 4, 4), make_mask((1, 1, 4, 4)), 2, 3)
    draw = partial(inpaint, gaussian(SHORT, 0.3, 0.2), SHORT, known=known, timesteps=uniform(100, 12))
    shape = (3, 4, 4)
    x, turned = (
        draw(PerImageNoise(list(map(PhiloxGenerator, seeds)), shape)) for seeds in (range(10, 16), [15, 10])
    )
    assert torch.equal(x[[5, 0]], turned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_resamples": 0}, "num_resamples is 0"),
        ({"jump_length": 0}, "jump_length is 0"),
        ({"jump_length": 20}, "jump_length is 20; .* less than the 20 steps"),
        ({"mask": torch.full((1, 1, 4, 4), 0.5)}, "mask has values other than 0 and 1"),
        ({"mask": torch.ones(1, 1, 4, 5)}, r"mask has shape \(1, 1, 4, 5\); .* \(2, 1, 4, 4\)"),
        ({"x_0": torch.zeros(1, 3, 4, 4)}, r"x_0 has shape \(1, 3, 4, 4\)"),
        ({"timesteps": [3, 4], "num_resamples": 1}, "timesteps are"),
    ],
)
def test_invalid_arguments_are_errors(changes, message):
    settings = {"x_0": torch.zeros(1, 1, 4, 4), "mask": torch.ones(1, 1, 4, 4), "num_resamples": 2, **changes}
    timesteps = settings.pop("timesteps", uniform(100, 20))
    with pytest.raises(ValueError, match=message):
        inpaint(TOY, SHORT, normal((2, 1, 4, 4)), known=Known(**settings), timesteps=timesteps)


@pytest.fixture
def files(tmp_path):
    """A picture, and a mask of its left half."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return picture


def write_net(folder, channels=1, process="gaussian"):
    changes = {"schedule.num_timesteps": 50, "model.zero_init": False, "model.channels": channels}
    config = override(TINY_NET, {**changes, "objective.process": process})
    checkpoint.write_net(TrainedNet(build_net(config), config), {"images_seen": 0}, folder)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_command_keeps_the_image_where_the_mask_is_white(tmp_path, files, channels):
    write_net(tmp_path / "net", channels=channels)
    run_script("net", "--out", "drawn", "--num-images", "3", "--num-sample-steps", "12", "--jump-length", "3")
    drawn = [np.atleast_3d(np.asarray(Image.open(tmp_path / f"drawn/{i:06d}.png"))) for i in range(3)]
    for image in drawn:
        assert image.shape == (8, 8, channels)
        assert (image[:, :4] == files[:, :4, None]).all()
    assert (drawn[0][:, 4:] != drawn[1][:, 4:]).any()
    assert (tmp_path / "drawn/grid.png").is_file()


def run_script(*words):
    argv = ["inpaint.py", *words, "--image", "picture.png", "--mask", "mask.png"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        repaint.main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("net --out new --jump-length 50", "jump_length is 50; .* 50 steps"),
        ("net --out new --num-sample-steps 51", "num_sample_steps is 51"),
        ("net --out net", "net"),
        ("mixed --out new", "process uniform_mix"),
    ],
)
def test_mistakes_of_the_command_are_one_line(tmp_path, files, words, message):
    write_net(tmp_path / "net")
    write_net(tmp_path / "mixed", process="uniform_mix")
    with pytest.raises(UserError, match=message):
        run_script(*words.split())
    assert not (tmp_path / "new").exists()
