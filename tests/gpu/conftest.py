"""Tests that need a CUDA GPU (`make gpu`) or its stand-in; without one they are skipped, and in CI left out."""

import os
from pathlib import Path

import pytest

from ddpm.config.json import override
from ddpm.config.tree import Config


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if os.environ.get("CI") != "true" or config.pluginmanager.has_plugin("support.cpu_as_gpu"):
        return None
    import torch

    return None if torch.cuda.is_available() else True


@pytest.fixture(autouse=True)
def gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")


@pytest.fixture
def config(tiny: Config) -> Config:
    every = {"train.log_every_images": 128, "train.sample_every_images": 256}
    return override(tiny, {"train.deterministic": True, **every})
