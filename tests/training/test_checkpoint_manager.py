"""The newest valid checkpoint of a run: a copy of another position or run is skipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import checkpoint_name
from support.trained import alter_json

from ddpm.config.tree import Config
from ddpm.runs import checkpoint, storage
from ddpm.runs.generations import Generations
from ddpm.runs.run_folder import RunFolder
from ddpm.training import checkpoint_manager
from ddpm.training.state import State


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"step": 4, "images_seen": 128}, "images_seen is 128"),
        ({"run_key": "b"}, "run_key is 'b'"),
    ],
)
def test_a_checkpoint_of_another_position_or_run_is_skipped(
    other: dict[str, Any], message: str, tiny: Config, tmp_path: Path
) -> None:
    run = RunFolder("one", storage.resolve(str(tmp_path)), "a")
    state = State.create(tiny, torch.device("cpu"))
    for state.step in (1, 2):
        state.images_seen = 32 * state.step
        folder = tmp_path / checkpoint_name(state.images_seen)
        checkpoint.write(state.snapshot(tiny, {"run_key": "a", "data_fingerprint": "b"}), folder)
    alter_json(folder, "state.json", other)
    warnings: list[str] = []
    with checkpoint_manager.latest_valid(run, Generations(), 0.0, warnings.append) as found:
        assert found == tmp_path / checkpoint_name(32)
    (warning,) = warnings
    assert message in warning
