"""Training, sampling and evaluation on a GPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm.build import build_objective
from ddpm.checkpoints import checkpoint
from ddpm.config import Config, override
from ddpm.data.reading import DataSet
from ddpm.diffusion.objectives import Eps, Loss
from ddpm.sampling import generate
from ddpm.training import loop, recorder
from ddpm.training.runtime import LocalRuntime, NoTracker
from ddpm.training.state import State

FLAGS = (
    *("--model.base-width", "8", "--model.width-multipliers", "1", "2", "--model.norm-groups", "4"),
    *("--schedule.num-timesteps", "50", "--train.total-images", "512", "--sample.num-sample-steps", "5"),
)


class Killed(Exception):
    """Stands for the death of the process."""


class KilledLater(NoTracker):
    def metrics(self, values: dict[str, float], images_seen: int) -> None:
        if images_seen > 128:
            raise Killed


def fit(config: Config, data_set: DataSet, folder: Path, kind: type[LocalRuntime] = LocalRuntime) -> State:
    return loop.train(config, kind(config, data_set, data_set.held_out(), folder), NoTracker())


def tensors(state: State) -> dict[str, Tensor]:
    parts = (state.net.state_dict(), state.ema.state_dict(), state.optimizer_tensors())
    return {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}


def newest_weights(run: Path) -> dict[str, Tensor]:
    return checkpoint.read_tensors(max(run.glob("checkpoint-*")) / "net.safetensors", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_killed_and_resumed_run_ends_bitwise_equal(
    config: Config, train_set: DataSet, tmp_path: Path, precision: str, compile: bool, dropout: float
) -> None:
    values = {"train.precision": precision, "train.compile": compile, "model.dropout": dropout}
    config = override(config, values)
    straight = tensors(fit(config, train_set, tmp_path / "straight"))
    runtime = LocalRuntime(config, train_set, train_set.held_out(), tmp_path / "broken")
    with pytest.raises(Killed):
        loop.train(config, runtime, KilledLater())
    resumed = tensors(fit(config, train_set, tmp_path / "broken"))
    assert straight.keys() == resumed.keys() and next(iter(straight.values())).is_cuda
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []


def test_no_step_waits_for_the_gpu(
    config: Config, train_set: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only logging and checkpoints wait: elsewhere PyTorch raises an error if the host would wait for the GPU."""
    late = []

    class Watched(LocalRuntime):
        def any_of(self, *flags: Tensor | bool, at_once: bool) -> tuple[Tensor, list[int]]:
            torch.cuda.set_sync_debug_mode("default" if at_once else "error")
            late.append(not at_once)
            return super().any_of(*flags, at_once=at_once)

    monkeypatch.setattr(recorder, "PROGRESS_INTERVAL_S", float("inf"))
    values = {"data.horizontal_flip": True, "model.num_classes": 10, "objective.variance": "learned"}
    try:
        fit(override(config, values), train_set, tmp_path / "run", Watched)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert late == [True, True, True, False] * 2


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_non_finite_step_changes_no_weight_although_the_host_sees_it_later(
    config: Config, train_set: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    calls, loss = iter(range(100)), Eps.loss

    def loss_with_nan(self: Eps, model: torch.nn.Module, *args: Any) -> Loss:
        value = loss(self, model, *args)
        bad = model.training and next(calls) == 1
        return value._replace(value=value.value * float("nan")) if bad else value

    monkeypatch.setattr(Eps, "loss", loss_with_nan)
    config = override(config, {"optim.skip_non_finite": allowed})
    if not allowed:
        with pytest.raises(loop.NonFinite):
            fit(config, train_set, tmp_path / "run")
        return
    state = fit(config, train_set, tmp_path / "run")
    assert state.skipped_steps == 1
    assert all(torch.isfinite(tensor).all() for tensor in tensors(state).values())


def test_an_image_does_not_depend_on_its_batch(config: Config, train_set: DataSet, tmp_path: Path) -> None:
    net, objective = fit(config, train_set, tmp_path / "run").ema.net, build_objective(config)
    device = next(net.parameters()).device
    together = generate.draw(net, config, objective, range(8), device=device).cpu().int()
    alone = [generate.draw(net, config, objective, [i], device=device).cpu().int() for i in range(8)]
    assert (
        together - torch.cat(alone)
    ).abs().max() <= 1  # another batch size may use kernels that round differently
    assert len(np.unique(together.numpy(), axis=0)) == 8


@pytest.mark.slow
def test_jobs_train_sample_and_evaluate(run_job: Callable[..., Any], tmp_path: Path) -> None:
    where = ("--run.name", "one", "--run.storage", tmp_path, "--cluster.gpu", "True")
    done = run_job("train", "digits", *FLAGS, *where)
    assert done.returncode == 0, done.stderr
    done = run_job("sample", tmp_path / "one", "--num-images", "4", "--out", tmp_path / "drawn")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "drawn/images").glob("*.png"))) == 4
    words = (
        "--features",
        "pixels",
        "--num-images",
        "60",
        "--num-draws",
        "2",
        "--out",
        tmp_path / "result.json",
    )
    done = run_job("evaluate", tmp_path / "one", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each worker; here are fewer than 2"
)
def test_two_workers_on_two_gpus_train_the_same_as_one(run_job: Callable[..., Any], tmp_path: Path) -> None:
    for workers in (1, 2):
        where = ("--run.name", f"workers-{workers}", "--run.storage", tmp_path, "--cluster.gpu", "True")
        done = run_job("train", "digits", *FLAGS, *where, "--cluster.num-workers", workers)
        assert done.returncode == 0, done.stderr
    one, two = (newest_weights(tmp_path / f"workers-{workers}") for workers in (1, 2))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=name)
