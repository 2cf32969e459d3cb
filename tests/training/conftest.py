"""A small real data set, and a run small enough to train in seconds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from faulted import Run
from sklearn.datasets import load_digits

from ddpm.config import Config, override
from ddpm.data.reading import DataSet
from ddpm.data.shards import make_manifest, write_manifest, write_shard
from ddpm.data.stream import open_data_set
from ddpm.presets import DIGITS
from ddpm.storage import resolve


@pytest.fixture(scope="session")
def digits_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Real digits as shards: 600 to train on in two shards, 60 held out."""
    location = resolve(str(tmp_path_factory.mktemp("digits")))
    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    shards = {
        split: [
            write_shard(
                location.filesystem,
                location.path,
                f"{split}/{i:05d}.parquet",
                images[part],
                labels[part],
                rows_per_row_group=100,
            )
            for i, part in enumerate(parts)
        ]
        for split, parts in {
            "train": [slice(0, 350), slice(350, 600)],
            "test": [slice(600, 660)],
        }.items()
    }
    names = [str(i) for i in range(10)]
    manifest = make_manifest("digits", 8, 8, 1, "raw", names, shards, options="test")
    write_manifest(location.filesystem, location.path, manifest)
    return location.uri


@pytest.fixture
def tiny(digits_uri: str) -> Config:
    """A net of some thousand weights, 8 steps of 32 images in 4 micro-batches."""
    torch.set_num_threads(1)
    return override(
        DIGITS,
        {
            "data.shards": digits_uri,
            "data.window_rows": 200,
            "schedule.num_timesteps": 50,
            "model.base_width": 8,
            "model.width_multipliers": [1, 2],
            "model.norm_groups": 4,
            "optim.lr_warmup_images": 64,
            "train.total_images": 256,
            "train.batch_size": 32,
            "train.micro_batch_size": 8,
            "train.log_every_images": 64,
            "train.checkpoint_every_images": 128,
            "train.sample_every_images": 128,
            "train.held_out_images": 40,
            "sample.num_images": 4,
            "sample.num_sample_steps": 5,
        },
    )


@pytest.fixture
def train_set(tiny: Config) -> DataSet:
    return open_data_set(tiny)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="session")
def undisturbed(digits_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run("undisturbed", str(folder / "runs"), digits_uri, folder / "job.log")
    with run.start(env={"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}) as job:
        assert job.wait() == 0, job.output
    return run


@pytest.fixture
def run(digits_uri: str, tmp_path: Path) -> Run:
    """A run of the same flags, to do harm to."""
    return Run("harmed", str(tmp_path / "runs"), digits_uri, tmp_path / "job.log")
