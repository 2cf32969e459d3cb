"""Fixtures: where runs of these tests are."""

from pathlib import Path

import pytest
from support.faulted import Run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def run(digits_uri: str, tmp_path: Path) -> Run:
    """A run with the flags of `undisturbed`, for fault injection."""
    return Run("harmed", str(tmp_path / "runs"), digits_uri, tmp_path / "job.log")
