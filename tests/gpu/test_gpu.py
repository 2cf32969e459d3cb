"""Training, sampling and evaluation on a GPU."""

import gc
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.local import Logged, fit, tensors
from torch import Tensor

from ddpm.build import TrainedNet, build_net
from ddpm.config.json import flatten, override
from ddpm.config.presets import PRESETS
from ddpm.config.tree import Config
from ddpm.data.reading import DataSet
from ddpm.diffusion.objectives import Eps, Loss
from ddpm.models.ema import EMA
from ddpm.runs import checkpoint
from ddpm.sampling import generate
from ddpm.training import loop, recorder
from ddpm.training.footprint import footprint
from ddpm.training.runtime import Runtime
from ddpm.training.state import parameter_count
from ddpm.utils.errors import UserError

FLAGS = (
    *("--model.base-width", "8", "--model.width-multipliers", "1", "2", "--model.norm-groups", "4"),
    *("--schedule.num-timesteps", "50", "--train.total-images", "512", "--sample.num-sample-steps", "5"),
)


class Killed(Exception):
    """Stands for the death of the process."""


class KilledLater(Logged):
    def metrics(self, values: Mapping[str, float], images_seen: int) -> None:
        if images_seen > 128:
            raise Killed


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
    with pytest.raises(Killed):
        fit(config, train_set, tmp_path / "broken", KilledLater())
    resumed = tensors(fit(config, train_set, tmp_path / "broken"))
    assert straight.keys() == resumed.keys() and next(iter(straight.values())).is_cuda
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []


class Watched(Runtime):
    """PyTorch raises an error if the host would wait for the GPU, except in steps that log or save."""

    late: ClassVar[list[bool]] = []

    def any_of(self, *flags: Tensor | bool, at_once: bool) -> tuple[Tensor, list[int]]:
        torch.cuda.set_sync_debug_mode("default" if at_once else "error")
        self.late.append(not at_once)
        return super().any_of(*flags, at_once=at_once)


class Stopped(Runtime):
    """Asked to stop in the third step; the fourth, in which a GPU's host learns of it, is bad."""

    num_steps = 0

    def agree(self, bad: Tensor, *, at_once: bool) -> tuple[Tensor, int, bool]:
        self.num_steps += 1
        return super().agree(bad | (self.num_steps == 4), at_once=at_once)

    def wants_stop(self) -> bool:
        return self.num_steps == 3


def test_the_last_step_before_a_stop_is_counted_if_it_is_bad(
    config: Config, train_set: DataSet, tmp_path: Path
) -> None:
    """It is in the last checkpoint; if no step may be skipped, it is an error."""
    intervals = {
        "train.log_every_images": 0,
        "train.checkpoint_every_images": 0,
        "train.sample_every_images": 0,
    }
    skipping = override(config, {"optim.skip_non_finite": 1, **intervals})
    state = fit(skipping, train_set, tmp_path / "run", runtime=Stopped)
    assert (state.step, state.skipped_steps) == (4, 1)
    stored = max((tmp_path / "run").glob("checkpoint-*"))
    assert checkpoint.read_state(stored)["skipped_steps"] == 1
    with pytest.raises(loop.NonFinite):
        fit(override(config, intervals), train_set, tmp_path / "other", runtime=Stopped)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Watched]]:
    monkeypatch.setattr(recorder, "PROGRESS_INTERVAL_S", float("inf"))
    monkeypatch.setattr(Watched, "late", [])
    yield Watched
    torch.cuda.set_sync_debug_mode("default")


NETS: dict[str, dict[str, Any]] = {
    "labels and learned variance": {"model.num_classes": 10, "objective.variance": "learned"},
    "muon": {"optim.kind": "muon", "train.precision": "bfloat16", "data.augment": 0.5},
    "edm": {"objective.predict": "edm", "objective.weight": "edm", "objective.timesteps": "log_normal"},
    "uniform_mix": {"objective.process": "uniform_mix", "data.horizontal_flip": True},
}


def case(name: str, config: Config) -> Config:
    """One of NETS, or a preset with the data, sizes and intervals of `config`."""
    if name in NETS:
        return override(config, NETS[name])
    own = {"model.dropout", "train.precision", "train.compile"}
    sizes = ("data.shards", "data.window_rows", "schedule.num_timesteps", "model.", "train.", "sample.")
    cut = {k: v for k, v in flatten(config).items() if k.startswith(sizes) and k not in own}
    return override(PRESETS[name], cut)


@pytest.mark.parametrize("name", ["cifar10", *NETS])
def test_no_step_waits_for_the_gpu(
    config: Config, train_set: DataSet, tmp_path: Path, watched: type[Watched], name: str
) -> None:
    fit(case(name, config), train_set, tmp_path / "run", runtime=watched)
    assert watched.late == [True, True, True, False] * 2


def test_a_step_that_waits_for_the_gpu_is_detected(
    config: Config,
    train_set: DataSet,
    tmp_path: Path,
    watched: type[Watched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update = EMA.update

    def update_and_read(self: EMA, net: torch.nn.Module, step: int) -> None:
        update(self, net, step)
        next(net.parameters()).sum().item()

    monkeypatch.setattr(EMA, "update", update_and_read)
    with pytest.raises(RuntimeError, match=r"_local_scalar_dense|synchroniz"):
        fit(config, train_set, tmp_path / "run", runtime=watched)
    assert watched.late == [True]


@pytest.mark.parametrize(
    ("waits", "use"),
    [
        (True, lambda x: x.sum().item()),
        (True, lambda x: bool((x > 0).all())),
        (True, lambda x: x.cpu()),
        (True, lambda x: x.tolist()),
        (True, lambda x: x[x > 0]),
        (True, lambda x: torch.ones(3).to(x.device)),
        (True, lambda x: torch.ones(3).copy_(x)),
        (False, lambda x: x.to("cpu", non_blocking=True)),
        (False, lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True)),
        (False, lambda x: x[x.argsort()] + torch.zeros(3, device=x.device)),
        (False, lambda x: torch.where(x > 0, x, 0)),
    ],
)
def test_what_waits_for_the_gpu(waits: bool, use: Callable[[Tensor], object]) -> None:
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError) if waits else nullcontext():
            use(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensors_of_host_and_gpu_do_not_mix() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="cuda:0"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError):
        torch.zeros(()).add_(x.sum())
    assert (x + torch.ones(())).is_cuda


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_non_finite_step_changes_no_weight_although_the_host_sees_it_later(
    config: Config, train_set: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    calls = iter(range(100))
    loss = Eps.loss

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


@pytest.fixture
def memory_fraction() -> Iterator[Callable[[float], None]]:
    """Limits this process to a fraction of the GPU's memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield torch.cuda.set_per_process_memory_fraction
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.slow
def test_a_gpu_of_less_memory_trains_the_same_in_smaller_passes(
    config: Config, train_set: DataSet, tmp_path: Path, memory_fraction: Callable[[float], None]
) -> None:
    """Passes of a part of a micro-batch have its flips, augmentation, t, eps, dropped labels and masks: weights and
    losses differ by the order of summation alone."""
    changes = {
        "data.horizontal_flip": True,
        "data.augment": 0.3,
        "model.num_classes": 10,
        "model.dropout": 0.3,
    }
    changes |= {"train.batch_size": 4096, "train.micro_batch_size": 1024, "train.total_images": 12_288}
    changes |= {"train.held_out_images": 0, "train.log_every_images": 4096, "train.sample_every_images": 0}
    config = override(config, changes)
    whole = Logged()
    parts = Logged()
    one = {
        name: tensor.cpu()
        for name, tensor in tensors(fit(config, train_set, tmp_path / "whole", whole)).items()
    }
    _, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    assert 0.5 < (footprint(config).memory or 0) / peak < 1.5
    gc.collect()
    torch.cuda.empty_cache()
    memory_fraction(0.2 * peak / total)
    small = tensors(fit(config, train_set, tmp_path / "parts", parts))
    (line,) = parts.warnings
    assert whole.warnings == [] and torch.cuda.max_memory_allocated() == peak
    (largest, taken) = map(int, re.findall(r"(?:pass of|passes take) (\d+)", line))
    assert largest == 4096 and taken < 1024
    for name, tensor in small.items():
        torch.testing.assert_close(tensor.cpu(), one[name], rtol=1e-3, atol=1e-4, msg=name)
    for images_seen, row in whole.rows.items():
        for name in ("train/loss", "train/grad_norm", "train/loss_t_quarter_1"):
            assert parts.rows[images_seen][name] == pytest.approx(row[name], rel=1e-3), name


def test_a_net_that_does_not_fit_at_all_is_a_user_error(
    config: Config, train_set: DataSet, tmp_path: Path, memory_fraction: Callable[[float], None]
) -> None:
    config = override(config, {"train.batch_size": 2, "train.micro_batch_size": 2, "model.base_width": 256})
    weights = 4 * parameter_count(build_net(config))
    _, total = torch.cuda.mem_get_info()
    memory_fraction(3 * weights / total)  # the net, its EMA and one of two moments
    with pytest.raises(UserError, match=r"--model\.base-width"):
        fit(config, train_set, tmp_path / "run")


def test_an_image_does_not_depend_on_its_batch(config: Config, train_set: DataSet, tmp_path: Path) -> None:
    trained = TrainedNet(fit(config, train_set, tmp_path / "run").ema.net, config)
    together = generate.draw(trained, range(8)).cpu().int()
    alone = [generate.draw(trained, [i]).cpu().int() for i in range(8)]
    # Another batch size may use kernels that round differently.
    assert (together - torch.cat(alone)).abs().max() <= 1
    assert len(np.unique(together.numpy(), axis=0)) == 8


@pytest.mark.slow
def test_jobs_train_sample_and_evaluate(run_job: Callable[..., Any], tmp_path: Path) -> None:
    where = ("--run.name", "one", "--run.storage", tmp_path, "--cluster.gpu", "True")
    done = run_job("train", "digits", *FLAGS, *where)
    assert done.returncode == 0, done.stderr
    done = run_job("sample", tmp_path / "one", "--num-images", "4", "--out", tmp_path / "drawn")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "drawn/images").glob("*.png"))) == 4
    words = ("--features", "pixels", "--num-images", "60", "--num-draws", "2")
    done = run_job("evaluate", tmp_path / "one", *words, "--out", tmp_path / "result.json")
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
