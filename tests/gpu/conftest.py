"""Tests that need a CUDA GPU: `make gpu`. They are skipped without one, and not collected in CI, where a skip fails."""

import os
from pathlib import Path

import pytest
from support.tiny import TINY_NET

from ddpm.config import Config, override
from ddpm.data.ray_dataset import open_configured
from ddpm.data.reading import DataSet


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if os.environ.get("CI") != "true":
        return None
    import torch

    return None if torch.cuda.is_available() else True


@pytest.fixture(autouse=True)
def gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")


@pytest.fixture
def config(digits_uri: str) -> Config:
    """A config with a few thousand weights, 8 steps of 32 images."""
    return override(
        TINY_NET,
        {
            "data.shards": digits_uri,
            "data.window_rows": 200,
            "schedule.num_timesteps": 50,
            "train.deterministic": True,
            "train.total_images": 256,
            "train.batch_size": 32,
            "train.micro_batch_size": 8,
            "train.log_every_images": 128,
            "train.checkpoint_every_images": 128,
            "train.sample_every_images": 256,
            "train.held_out_images": 40,
            "sample.num_images": 4,
            "sample.num_sample_steps": 5,
        },
    )


@pytest.fixture
def train_set(config: Config) -> DataSet:
    return open_configured(config)
