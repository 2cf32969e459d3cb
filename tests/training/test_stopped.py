"""A run in Python that is stopped before its first step: the process goes on, and nothing of the run does."""

import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data.reading import DataSet
from ddpm.runs import generations, run_folder
from ddpm.training import fit

TIMEOUT_S = 300


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_a_run_stopped_before_its_first_step_takes_none(
    tiny: Config, train_set: DataSet, tmp_path: Path
) -> None:
    config = override(tiny, {"run.name": "one", "run.storage": str(tmp_path / "runs")})

    def stop(values: Mapping[str, Any]) -> bool:
        signal.raise_signal(signal.SIGTERM)  # at the first look at the run, long before its workers are there
        return True

    result = fit.fit(config, train_set, should_continue=stop)
    assert (result.signal, result.images_seen, result.checkpoint) == (signal.SIGTERM, 0, None)
    for thread in threading.enumerate():
        if thread.name == "ddpm-fit":
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
    assert {file.name for file in (tmp_path / "runs/one").iterdir()} == {run_folder.CARD, generations.FILE}
