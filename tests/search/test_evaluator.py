"""Evaluation of a trial's checkpoint: equal random draws for all trials, and the results of jobs/evaluate.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.evaluated import CONFIG, make_data, make_run

from ddpm.checkpoints import checkpoint
from ddpm.config import Config
from ddpm.config_io import override
from ddpm.data.manifest import read_manifest
from ddpm.data.reading import DataSet
from ddpm.diffusion import likelihood
from ddpm.evaluation import context, evaluate
from ddpm.evaluation.settings import Settings
from ddpm.search.evaluator import Evaluation, Evaluator
from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError

LINEAR = override(CONFIG, {"schedule.kind": "linear", "schedule.num_timesteps": 30, "run.name": "linear"})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def evaluator(shards: str) -> Evaluator:
    place = locations.resolve(shards)
    train = DataSet(place, read_manifest(place), "train")
    held_out = train.held_out()
    assert held_out is not None
    return Evaluator(train, held_out, num_images=60, num_draws=2)


def make_checkpoint(folder: Path, shards: str, config: Config = CONFIG) -> Location:
    return make_run(folder, shards, config).location.child(checkpoint.name_at(192))


def test_results_equal_those_of_the_evaluate_job(evaluator: Evaluator, shards: str, tmp_path: Path) -> None:
    stored = make_checkpoint(tmp_path, shards)
    found = evaluator.evaluate(stored)
    settings = Settings(num_images=60, features="pixels", num_draws=2)
    (result,) = evaluate.evaluate(context.read([stored.uri]), settings, 1).results
    whole = result.bits[0]
    rung, bits = found.rung(training_s=1.5), np.array(found.bits)
    assert (bits.mean(), bits.std(ddof=1) / 60**0.5) == pytest.approx((whole.value, whole.error), rel=1e-6)
    assert (rung.bits_per_dim, rung.bits_per_dim_error) == (bits[::2].mean(), bits[::2].std(ddof=1) / 30**0.5)
    assert (rung.images_seen, len(found.bits), rung.training_s) == (192, 60, 1.5)
    assert rung.train_loss != rung.held_out_loss
    run = locations.resolve(str(tmp_path / "run"))
    found.write(run)
    assert Evaluation.read(run, 192, 0.0) == found
    run.child("rungs").child("000000000192.json").write(b"{}")
    with pytest.raises(UserError, match=r"rungs/000000000192\.json is damaged"):
        Evaluation.read(run, 192, 0.0)


def test_all_trials_are_evaluated_on_the_same_random_draws(
    evaluator: Evaluator, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another schedule and another T, the images, the noise and the quantiles of t are the same."""
    estimate, draw_timesteps = likelihood.estimate, likelihood.draw_timesteps
    recorded, quantiles = [], []

    def spy(denoise, schedule, x_0, noise, *others):  # type: ignore[no-untyped-def]
        def recording():  # type: ignore[no-untyped-def]
            eps.append(noise())
            return eps[-1]

        eps: list[torch.Tensor] = []
        bound = estimate(denoise, schedule, x_0, recording, *others)
        u, t = quantiles.pop()
        recorded.append((x_0, u, torch.stack(eps), t))
        return bound

    def spy_on_quantiles(schedule, proposal, u, num_draws):  # type: ignore[no-untyped-def]
        t, share = draw_timesteps(schedule, proposal, u, num_draws)
        quantiles.append((u, t))
        return t, share

    monkeypatch.setattr(likelihood, "estimate", spy)
    monkeypatch.setattr(likelihood, "draw_timesteps", spy_on_quantiles)
    first = evaluator.evaluate(make_checkpoint(tmp_path, shards))
    second = evaluator.evaluate(make_checkpoint(tmp_path, shards, LINEAR))
    (x_0, u, eps, t), (other_x_0, other_u, other_eps, other_t) = recorded
    assert torch.equal(x_0, other_x_0) and torch.equal(u, other_u) and torch.equal(eps, other_eps)
    assert not torch.equal(t, other_t) and first.bits != second.bits
    assert len(set(u.tolist())) == 60 and eps.shape == (3, 60, 1, 8, 8)


def test_an_unusable_net_is_a_one_line_error(evaluator: Evaluator, shards: str, tmp_path: Path) -> None:
    stored = make_checkpoint(tmp_path, shards)
    with pytest.MonkeyPatch.context() as patch:
        load = checkpoint.load_net

        def broken(*args):  # type: ignore[no-untyped-def]
            trained = load(*args)
            with torch.no_grad():
                next(trained.net.parameters()).fill_(torch.nan)
            return trained

        patch.setattr(checkpoint, "load_net", broken)
        with pytest.raises(UserError, match="is not finite: its net is unusable"):
            evaluator.evaluate(stored)
