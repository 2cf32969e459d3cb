"""What this version writes is read again. From the first release on, tests/formats has a folder of each, never changed.

The folder of today's formats is made by `PYTHONPATH=tests python tests/test_formats.py tests/formats/unreleased`.
"""

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tracked
from support.checkpoints import checkpoint_name
from support.faulted import write_digits
from support.local import finished

from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.config.tree import Config
from ddpm.data.ray_stream import open_configured
from ddpm.runs import checkpoint, curves, names, run_folder
from ddpm.sampling import generate
from ddpm.tracking.push import push
from ddpm.training import loop
from ddpm.training.runtime import Runtime
from ddpm.training.state import State
from ddpm.training.store import RunStore

KEPT = Path(__file__).parent / "formats" / "unreleased"
CHANGES = {
    "data.window_rows": 200,
    "schedule.num_timesteps": 20,
    "model.base_width": 4,
    "model.width_multipliers": [1],
    "model.norm_groups": 2,
    "model.dropout": 0.1,
    "model.attention_resolutions": [],
    "train.total_images": 64,
    "train.batch_size": 32,
    "train.micro_batch_size": 8,
    "train.log_every_images": 32,
    "train.held_out_images": 8,
    "sample.num_images": 4,
    "sample.num_sample_steps": 4,
}


def config_in(folder: Path, **changes: object) -> Config:
    return override(DIGITS, {**CHANGES, "data.shards": str(folder / "data"), **changes})


def train(config: Config, folder: Path) -> State:
    run = run_folder.open_run("run", str(folder))
    data_set = open_configured(config)
    with finished(RunStore(config, run, data_set.rows.fingerprint)) as store:
        return loop.train(config, Runtime(config, data_set, data_set.held_out(), store))


def write(folder: Path) -> None:
    """Write one of each format."""
    write_digits(folder / "data")
    train(config_in(folder), folder)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy."""
    return Path(shutil.copytree(KEPT, tmp_path / "kept"))


def test_data_are_read_in_the_same_order(kept: Path) -> None:
    data_set = open_configured(config_in(kept))
    images = data_set.read(data_set.plan(seed=0, window_rows=200), 590, 610)
    digest = hashlib.sha256(images.image.tobytes() + images.label.tobytes()).hexdigest()
    assert digest[:16] == "b5312a37adf787bf"


def test_a_run_is_sampled_and_resumed(kept: Path) -> None:
    torch.set_num_threads(1)
    with names.local_checkpoint(str(kept / "run")) as folder:
        trained = checkpoint.load_net(folder)
    drawn = generate.draw(trained, range(2)).numpy()
    assert drawn.shape == (2, 8, 8, 1) and np.ptp(drawn) > 50
    state = train(config_in(kept, **{"train.total_images": 96}), kept)
    assert (state.step, state.images_seen) == (3, 96)
    run = run_folder.existing_run(str(kept / "run"))
    points = curves.read(run.location)["train/loss"]
    assert [point.images_seen for point in points] == [32, 64, 96]
    assert points[0].value == pytest.approx(0.9977, abs=1e-4)


def test_a_run_is_pushed(kept: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    run = run_folder.existing_run(str(kept / "run"))
    logged = curves.read(run.location)
    assert push(run).num_points == sum(map(len, logged.values())) > 0
    assert push(run).num_points == 0
    found = tracked.run_with_key(mlflow_server, run.key)
    for name, curve in logged.items():
        expected = [(point.images_seen, point.value) for point in curve]
        assert tracked.history(mlflow_server, found, name) == expected
    assert found.data.params["model.base_width"] == "4"


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
def test_the_commands_resume_sample_and_compare_a_run(run_job: Callable[..., Any], kept: Path) -> None:
    folder = kept / "run" / checkpoint_name(64)
    where = ("--data.shards", kept / "data", "--run.name", "run", "--run.storage", kept)
    for words in (
        ("train", "digits", "--config", folder / "config.json", *where, "--train.total-images", "96"),
        ("sample", folder, "--num-images", "2", "--out", "drawn"),
        ("compare", kept / "run", "--out", "report.html"),
    ):
        done = run_job(*words, cwd=kept)
        assert done.returncode == 0, done.stderr
    assert (kept / "run" / checkpoint_name(96, 2) / checkpoint.CHECKSUMS).exists()
    assert (kept / "drawn/images/000001.png").exists()
    assert (kept / "report.html").exists()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
