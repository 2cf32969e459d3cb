"""What ranks trials: the results of jobs/evaluate.py, equal random draws for all trials, measured by the loop."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import local
from support.checkpoints import checkpoint_name
from support.evaluated import CONFIG, make_data, make_run
from torch import Tensor

from ddpm.build import TrainedNet
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data.manifest import read_manifest
from ddpm.data.reading import DataSet
from ddpm.diffusion import likelihood
from ddpm.evaluation import evaluate, inputs, rung
from ddpm.evaluation.rung import RANKING, Evaluation, Evaluator, Rungs
from ddpm.evaluation.settings import Settings
from ddpm.runs import checkpoint, storage
from ddpm.runs.storage import Location
from ddpm.training import checkpoint_manager
from ddpm.training.runtime import Runtime
from ddpm.utils.errors import UserError

LINEAR = override(CONFIG, {"schedule.kind": "linear", "schedule.num_timesteps": 30, "run.name": "linear"})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def evaluator(shards: str) -> Evaluator:
    place = storage.resolve(shards)
    train = DataSet(place, read_manifest(place), "train")
    held_out = train.held_out()
    assert held_out is not None
    return Evaluator(train, held_out, num_images=60, num_draws=2)


def make_checkpoint(folder: Path, shards: str, config: Config = CONFIG) -> Location:
    return make_run(folder, shards, config).location.child(checkpoint_name(192))


def make_trained(folder: Path, shards: str, config: Config = CONFIG) -> TrainedNet:
    return checkpoint.load_net(Path(make_checkpoint(folder, shards, config).path))


def test_results_equal_those_of_the_evaluate_job(evaluator: Evaluator, shards: str, tmp_path: Path) -> None:
    stored = make_checkpoint(tmp_path, shards)
    found = evaluator.evaluate(checkpoint.load_net(Path(stored.path)), 192)
    settings = Settings(num_images=60, features="pixels", num_draws=2)
    (result,) = evaluate.evaluate(inputs.read_checkpoints([stored.uri]), settings, 1).results
    whole = result.bits
    assert whole is not None
    bits = np.array(found.bits)
    assert (bits.mean(), bits.std(ddof=1) / 60**0.5) == pytest.approx((whole.value, whole.error), rel=1e-6)
    half = bits[RANKING]
    assert len(half) == 30 and found.bits_per_dim == (half.mean(), half.std(ddof=1) / 30**0.5)
    assert found.images_seen == 192 and found.train_loss != found.held_out_loss


def test_results_are_read_as_they_were_stored(tmp_path: Path) -> None:
    run = storage.resolve(str(tmp_path))
    assert rung.recorded_at(run) == []
    for images_seen in (192, 64):
        found = Evaluation(images_seen, (1 / 3, 2.5), 0.1, 0.7)
        run.child(rung.file_name(images_seen)).write(found.to_json())
        assert rung.read(run, images_seen) == found
    assert rung.recorded_at(run) == [64, 192]
    with pytest.raises(FileNotFoundError):
        rung.read(run, 128)
    run.child(rung.file_name(64)).write(b"{}")
    with pytest.raises(UserError, match=r"rungs/000000000064\.json is damaged"):
        rung.read(run, 64)


def test_several_workers_find_what_one_finds(evaluator: Evaluator, shards: str, tmp_path: Path) -> None:
    """Each bound comes from one worker; the sums of losses have another order."""
    trained = make_trained(tmp_path, shards)
    whole = replace(evaluator, num_images=297, num_draws=1)
    world_size = 2
    parts: dict[int, Tensor] = {}
    all_are_there = threading.Barrier(world_size, timeout=100)

    def measured_by(rank: int) -> Evaluation:
        def total(values: Tensor) -> Tensor:
            parts[rank] = values
            all_are_there.wait()
            return torch.stack(list(parts.values())).sum(0)

        return whole.evaluate(trained, 192, rank, world_size, total)

    alone = whole.evaluate(trained, 192)
    with ThreadPoolExecutor(world_size) as pool:
        found = list(pool.map(measured_by, range(world_size)))
    assert all(part[:297].any() for part in parts.values())
    for each in found:
        assert each.bits == alone.bits
        losses = each.held_out_loss, each.train_loss
        assert losses == pytest.approx((alone.held_out_loss, alone.train_loss), rel=1e-12)


def test_all_trials_are_evaluated_on_the_same_random_draws(
    evaluator: Evaluator, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another schedule and another T, the images, the noise and the quantiles of t are the same."""
    estimate = likelihood.estimate
    draw_timesteps = likelihood.draw_timesteps
    recorded: list[Any] = []
    quantiles: list[Any] = []

    def spy(denoise, schedule, x_0, noise, *others):  # type: ignore[no-untyped-def]
        def recording():  # type: ignore[no-untyped-def]
            eps.append(noise())
            return eps[-1]

        eps: list[Tensor] = []
        bound = estimate(denoise, schedule, x_0, recording, *others)
        u, t = quantiles.pop()
        recorded.append((x_0, u, torch.stack(eps), t))
        return bound

    def spy_on_quantiles(schedule, proposal, u, num_draws):  # type: ignore[no-untyped-def]
        drawn = draw_timesteps(schedule, proposal, u, num_draws)
        quantiles.append((u, drawn.t))
        return drawn

    monkeypatch.setattr(likelihood, "estimate", spy)
    monkeypatch.setattr(likelihood, "draw_timesteps", spy_on_quantiles)
    first = evaluator.evaluate(make_trained(tmp_path, shards), 192)
    second = evaluator.evaluate(make_trained(tmp_path, shards, LINEAR), 192)
    (x_0, u, eps, t), (other_x_0, other_u, other_eps, other_t) = recorded
    assert torch.equal(x_0, other_x_0) and torch.equal(u, other_u) and torch.equal(eps, other_eps)
    assert not torch.equal(t, other_t) and first.bits != second.bits
    assert len(set(u.tolist())) == 60 and eps.shape == (3, 60, 1, 8, 8)


def test_an_unusable_net_is_a_one_line_error(evaluator: Evaluator, shards: str, tmp_path: Path) -> None:
    trained = make_trained(tmp_path, shards)
    with torch.no_grad():
        next(trained.net.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"optim\.lr") as raised:
        evaluator.evaluate(trained, 192)
    assert "\n" not in str(raised.value)


def trial_runtime(rungs: Rungs, reached: list[Evaluation]) -> Any:
    """The Runtime of a trial, which appends what the loop has measured to `reached`."""

    class TrialRuntime(Runtime):
        def reached(self, rung: Evaluation) -> None:
            reached.append(rung)

    TrialRuntime.rungs = rungs
    return TrialRuntime


def test_the_loop_measures_a_trial_at_its_rungs_and_trains_it_the_same(
    tiny: Config, train_set: DataSet, tmp_path: Path
) -> None:
    held_out = train_set.held_out()
    assert held_out is not None
    evaluator = Evaluator(train_set, held_out, num_images=20, num_draws=2)
    config = override(tiny, {"train.total_images": 128, "train.checkpoint_every_images": 32})
    reached: list[Evaluation] = []
    runtime = trial_runtime(Rungs((96, 128), evaluator), reached)
    state = local.fit(config, train_set, tmp_path / "trial", runtime=runtime)
    run = storage.resolve(str(tmp_path / "trial"))
    assert rung.recorded_at(run) == [96, 128]
    for found in reached:
        assert rung.read(run, found.images_seen) == found
        trained = checkpoint.load_net(Path(run.path, checkpoint_name(found.images_seen)))
        assert evaluator.evaluate(trained, found.images_seen) == found
    assert [found.images_seen for found in reached] == [96, 128]

    plain = local.fit(config, train_set, tmp_path / "plain")
    local.assert_same(local.tensors(state), local.tensors(plain))
    assert not (tmp_path / "plain" / rung.FOLDER).exists()


def test_a_rung_is_stored_before_its_checkpoint(
    tiny: Config, train_set: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that resumes from the checkpoint does not measure it again."""
    held_out = train_set.held_out()
    assert held_out is not None
    commit = checkpoint_manager._commit
    there = []

    def spy(folder: Path, target: Location, retry: Any, *, move: bool) -> None:
        there.append((Path(target.path).name, rung.recorded_at(storage.resolve(str(tmp_path / "run")))))
        commit(folder, target, retry, move=move)

    monkeypatch.setattr(checkpoint_manager, "_commit", spy)
    rungs = Rungs((32, 64), Evaluator(train_set, held_out, num_images=20, num_draws=2))
    first: list[Evaluation] = []
    whole = override(tiny, {"train.total_images": 64, "train.checkpoint_every_images": 32})
    local.fit(
        override(whole, {"train.total_images": 32}),
        train_set,
        tmp_path / "run",
        runtime=trial_runtime(rungs, first),
    )
    second: list[Evaluation] = []
    local.fit(whole, train_set, tmp_path / "run", runtime=trial_runtime(rungs, second))
    assert (checkpoint_name(32), [32]) in there and (checkpoint_name(64, 2), [32, 64]) in there
    assert [found.images_seen for found in first + second] == [32, 64]
