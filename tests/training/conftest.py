"""Fixtures: a run small enough to train in seconds."""

from pathlib import Path

import pytest
import torch
from support.faulted import Run

from ddpm.config import Config, override
from ddpm.data.ray_dataset import open_configured
from ddpm.data.reading import DataSet
from ddpm.presets import DIGITS


@pytest.fixture
def tiny(digits_uri: str) -> Config:
    """A config with a few thousand weights, 8 steps of 32 images in 4 micro-batches."""
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
            "optim.lr": 2e-3,
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
    return open_configured(tiny)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def run(digits_uri: str, tmp_path: Path) -> Run:
    """A run with the flags of `undisturbed`, for fault injection."""
    return Run("harmed", str(tmp_path / "runs"), digits_uri, tmp_path / "job.log")
