"""Ray Train and Ray Data for real: any number of workers trains the run that one process trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ddpm.config import Config, override
from ddpm.data.reading import DataSet
from ddpm.training import loop
from ddpm.training.runtime import LocalRuntime, NoTracker

FLAGS = """--data.window-rows 200 --schedule.num-timesteps 50 --model.base-width 8 --model.width-multipliers 1 2
    --model.norm-groups 4 --optim.lr-warmup-images 64 --train.batch-size 32 --train.micro-batch-size 8
    --train.log-every-images 64 --train.checkpoint-every-images 128 --train.sample-every-images 128
    --train.held-out-images 40 --sample.num-images 4 --sample.num-sample-steps 5
    --cluster.threads-per-worker 1""".split()
"""The fixture `tiny`, as flags."""


@pytest.fixture
def train_job(run_job: Callable[..., Any], digits_uri: str, tmp_path: Path) -> Callable[..., Any]:
    def run(name: str, *flags: str, total_images: int = 256, env: dict[str, str] | None = None) -> Any:
        where = ("--data.shards", digits_uri, "--run.name", name, "--run.storage", str(tmp_path / "runs"))
        total = ("--train.total-images", str(total_images))
        return run_job("train", "digits", *where, *total, *FLAGS, *flags, cwd=tmp_path, env=env)

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = ("net", "ema", "optimizer")
    return {
        f"{file}.{name}": tensor
        for file in files
        for name, tensor in load_file(folder / f"{file}.safetensors").items()
    }


def newest(tmp_path: Path, name: str) -> Path:
    return sorted((tmp_path / "runs" / name).glob("checkpoint-*"))[-1]


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.slow
def test_one_ray_worker_trains_what_one_process_trains(
    train_job: Callable[..., Any], tiny: Config, train_set: DataSet, tmp_path: Path
) -> None:
    """Bit for bit; and the same command goes on where the run stopped, then says that it is finished."""
    done = train_job("ray")
    assert done.returncode == 0, done.stderr
    assert "256/256" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    grid = tmp_path / "runs/ray/samples/latest.png"
    assert str(grid) in done.stdout and grid.exists()

    local = LocalRuntime(tiny, train_set, train_set.held_out(), tmp_path / "local")
    loop.train(tiny, local, NoTracker())
    assert_same(newest(tmp_path, "ray"), tmp_path / "local/checkpoint-000000000256")

    longer = train_job("ray", total_images=384)
    assert longer.returncode == 0, longer.stderr
    straight = override(tiny, {"train.total_images": 384})
    # With lr_schedule cosine a longer run is another run from the start; the order and the noise are the same.
    assert straight.optim.lr_schedule == "cosine"
    state = json.loads((newest(tmp_path, "ray") / "state.json").read_text())
    assert (state["step"], state["images_seen"]) == (12, 384)

    again = train_job("ray", total_images=384)
    assert again.returncode == 0
    assert "run ray is finished: 384 images seen; nothing left to do" in again.stdout
    assert newest(tmp_path, "ray").name == "checkpoint-000000000384"


@pytest.mark.slow
def test_two_workers_train_what_one_trains(
    train_job: Callable[..., Any], tiny: Config, train_set: DataSet, tmp_path: Path
) -> None:
    done = train_job("two", "--cluster.num-workers", "2")
    assert done.returncode == 0, done.stderr
    loop.train(tiny, LocalRuntime(tiny, train_set, train_set.held_out(), tmp_path / "local"), NoTracker())
    one, two = weights(tmp_path / "local/checkpoint-000000000256"), weights(newest(tmp_path, "two"))
    for name in one:  # gradients are summed in another order
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=name)
    import numpy as np
    from PIL import Image

    grids = [
        np.asarray(Image.open(p / "samples/latest.png"), int)
        for p in (tmp_path / "local", tmp_path / "runs/two")
    ]
    assert np.abs(grids[0] - grids[1]).max() <= 2  # the same images in the same places
