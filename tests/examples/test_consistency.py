"""Consistency tuning: parity with the formulas of ECT in float64, written here as the paper has them; its sampler."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion.test_edm_and_flow import GEOMETRIC, SHAPE, Net, drawn, edm_denoiser, loss_and_gradient
from support import examples
from support.exact_denoisers import denoiser_from_x_0, normal
from support.local import Logged, assert_same, fit, tensors

from ddpm import build
from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.config.tree import Config, SampleConfig
from ddpm.data.reading import DataSet
from ddpm.diffusion import schedules
from ddpm.diffusion.objectives import Edm, Eps, Flow, V
from ddpm.models import dropout
from ddpm.models.dropout import Dropout
from ddpm.tracking import run_params
from ddpm.utils.generators import PhiloxGenerator

Consistency = examples.load("consistency", "ddpm_consistency.objective").Consistency
multistep = examples.load("consistency", "ddpm_consistency.sampler").multistep

COSINE = schedules.cosine(500)


def wanted(sigma, stage):
    """r = t (1 - n(t) / q^a), n(t) = 1 + k S(-b t), at least 0. Geng et al. 2024, Sec. 3; q = 2, k = 8, b = 1."""
    return (sigma * (1 - (1 + 8 / (1 + sigma.exp())) / 2**stage)).clamp(min=0)


@pytest.mark.parametrize("stage", range(1, 9))
def test_loss_and_gradient_are_those_of_the_paper(stage):
    """E w d(D(x_0 + t eps; t), sg D(x_0 + r eps; r)), w = 1 / (t - r), d = sqrt(|.|^2 + c^2) - c; per root of D."""
    of = Edm(GEOMETRIC, log_sigma=(0.5, 2.0), sigma_data=0.5)
    x_0, t, eps = drawn(of)
    sigma = GEOMETRIC.sigma[t].view(-1, 1, 1, 1)
    levels = torch.cat([torch.zeros(1, dtype=torch.float64), GEOMETRIC.sigma])
    distance = (levels - wanted(sigma.flatten(), stage)[:, None]).abs()
    index = torch.minimum(distance.argmin(1), t)  # of the level 0 and the T others: at least one below t
    r = levels[index].view(-1, 1, 1, 1)

    def theirs(net):
        with torch.no_grad():
            target = edm_denoiser(net, x_0 + r * eps, r, (index - 1).clamp(min=0), 0.5)
            target = torch.where(r == 0, x_0, target)
        difference = edm_denoiser(net, x_0 + sigma * eps, sigma, t, 0.5) - target
        D = 16
        c = 0.00054 * 16**0.5
        d = (difference.square().flatten(1).sum(1) + c**2).sqrt() - c
        return (d / (sigma - r).flatten()).mean() / D**0.5

    assert (r == 0).any() == (stage <= 2) and (r > 0).any()
    progress = (stage - 0.5) / 8
    ours = loss_and_gradient(
        lambda net: Consistency(of).loss(net, x_0, None, PhiloxGenerator(3), progress).value
    )
    for a, b in zip(ours, loss_and_gradient(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=0)


@pytest.mark.parametrize("schedule", [COSINE, GEOMETRIC, schedules.linear(1000, 1e-4, 0.02)])
def test_the_levels_of_a_pair_approach_each_other_in_eight_stages(schedule):
    tables = [Consistency(V(schedule)).lower((stage + 0.5) / 8) for stage in range(8)]
    t = torch.arange(schedule.num_timesteps)
    for coarse, fine in pairwise(tables):
        assert (coarse <= fine).all() and (coarse < fine).any()
    assert all((table < t).all() and (table >= -1).all() and table.dtype == torch.int64 for table in tables)
    for progress, table in ((0.0, tables[0]), (0.124, tables[0]), (0.125, tables[1]), (1.0, tables[7])):
        assert torch.equal(Consistency(V(schedule)).lower(progress), table)


@pytest.mark.parametrize("prediction", [Eps, V, Edm, Flow])
def test_without_noise_x_0_hat_is_the_input(prediction):
    """f(x, 0) = x, for any net: here at the least noise that a schedule can have."""
    of = prediction(schedules.geometric(2, 1e-7, 1.0))
    x_t = normal(SHAPE)()
    x_0_hat = Consistency(of).denoise(Net(), x_t, torch.zeros(16, dtype=torch.int64), None).x_0_hat
    torch.testing.assert_close(x_0_hat, x_t, rtol=0, atol=1e-5)


def test_a_pair_has_one_noise_one_label_and_one_dropout_mask():
    layer = Dropout(0.5)
    calls = []
    labels = []

    def net(x_t, t, label):
        calls.append((x_t, t))
        labels.append(label)
        return layer(torch.ones_like(x_t))

    x_0 = normal(SHAPE, 1)()
    label = torch.arange(16) % 10
    of = V(COSINE, build.build_objective(override(DIGITS, {"model.num_classes": 10})).labels)
    keys = torch.randint(-(2**31), 2**31, (1, 16, 2), generator=torch.Generator().manual_seed(0)).int()
    with dropout.keyed([layer], keys):
        loss = Consistency(of).loss(net, x_0, label, PhiloxGenerator(0), 0.5)
        masks = [layer(torch.ones(SHAPE)) for _ in range(2)]
    (x_r, r), (x_t, t) = calls
    assert torch.equal(*masks) and torch.equal(*labels) and (labels[0] == 10).any() and (r < t).all()

    def noise(x, t):
        a = COSINE.alpha_bar[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * x_0) / (1 - a).sqrt()

    torch.testing.assert_close(noise(x_r, r), noise(x_t, t), rtol=1e-8, atol=1e-8)
    assert torch.equal(loss.quarter, 4 * t // 500)


def exact(schedule, mean, std):
    """The consistency function of data from N(mean, std^2): the path through x_t keeps its place in units of std."""

    def predict(x_t, alpha_bar):
        return mean + std * (x_t - alpha_bar.sqrt() * mean) / (alpha_bar * std**2 + 1 - alpha_bar).sqrt()

    return denoiser_from_x_0(schedule, predict)


@pytest.mark.parametrize(
    ("n", "visited"), [(None, [499, 250]), (1, [499]), (2, [499, 250]), (5, [499, 399, 299, 200, 100])]
)
def test_steps_reach_the_distribution_of_the_data(n, visited, on_path):
    on_path("consistency")
    sample = SampleConfig(sampler="multistep", num_sample_steps=n, clip_x_0=False)
    chosen = build.build_timesteps(sample, COSINE, 16)
    assert chosen == visited
    sampler = build.bind_sampler(multistep, sample, COSINE, 16)
    steps = list[int]()
    x = sampler(exact(COSINE, 0.3, 0.2), normal((20_000, 1, 2, 2)), lambda step, *_: steps.append(step))
    assert abs(x.mean() - 0.3) < 0.004 and abs(x.std() - 0.2) < 0.003
    assert steps == list(range(len(chosen)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--objective.predict x_0",
            "predict is 'x_0'; for consistency it must be eps, v, edm or flow: f(x, 0) m",
        ),
        ("--objective.variance learned", "variance is 'learned'; consistency has no bound to learn it from"),
        ("--sampler ddim", "sampler ddim cannot undo the process consistency; use multistep"),
        ("--sample.num-sample-steps 501", "sample: num_sample_steps is 501; it must be in 1..500"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    user_error: Callable[..., str], on_path: Callable[[str], None], flags: str, message: str
):
    on_path("consistency")
    assert message in user_error("train", "digits", "--objective.process", "consistency", *flags.split())


class Interrupted(Exception):
    """Stands for the death of the process."""


class Killed(Logged):
    def metrics(self, values: Mapping[str, float], images_seen: int) -> None:
        if images_seen > 128:
            raise Interrupted


def test_tuning_that_was_interrupted_ends_with_the_same_weights(
    tiny: Config, train_set: DataSet, tmp_path: Path, on_path: Callable[[str], None]
) -> None:
    """It samples by multistep, and has a held-out loss, but no bits/dim."""
    on_path("consistency")
    changes = {"objective.process": "consistency", "objective.predict": "v", "sample.num_sample_steps": 1}
    config = override(tiny, {**changes, "model.dropout": 0.2})
    logged = Logged()
    straight = fit(config, train_set, tmp_path / "straight", logged)
    with pytest.raises(Interrupted):
        fit(config, train_set, tmp_path / "broken", Killed())
    assert_same(tensors(straight), tensors(fit(config, train_set, tmp_path / "broken")))
    assert "held_out/loss" in logged.rows[256] and "held_out/bits_per_dim" not in logged.rows[256]
    found = run_params.params(config)
    assert "objective.predict" in found and "objective.weight" not in found
    assert build.resolve_sample(config.sample, config.objective).sampler == "multistep"


@pytest.mark.slow
def test_a_net_is_tuned_from_the_command_line(run_job: Callable[..., Any], tmp_path: Path) -> None:
    env = examples.env("consistency")
    tuning = (
        "--objective.process consistency --train.init-from builtin:digits --train.total-images 640".split()
    )
    done = run_job("train", "digits", *tuning, "--workers", "1", "--name", "few", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    words = "runs/few --num-images 4 --num-sample-steps 1 --out drawn".split()
    done = run_job("sample", *words, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "drawn/grid.png").is_file()
