"""The newest valid checkpoint of a run: one that is misplaced is skipped, whatever its checksums say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.forged import forge_json

from ddpm.checkpoints import checkpoint
from ddpm.checkpoints.runs import Run
from ddpm.config import Config
from ddpm.storage import locations
from ddpm.training import checkpoint_manager
from ddpm.training.state import State


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        ({"step": 4, "images_seen": 128}, "images_seen is 128, in a folder named checkpoint-000000000064"),
        ({"run_key": "b"}, "is of another run: run_key is 'b'; run.json has 'a'"),
        ({"run_key": ""}, "is of another run: run_key is ''"),
    ],
)
def test_a_checkpoint_of_another_position_or_run_is_skipped(
    forged: dict[str, Any], message: str, tiny: Config, tmp_path: Path
) -> None:
    run = Run("one", locations.resolve(str(tmp_path)), "a")
    state = State.create(tiny, torch.device("cpu"))
    for state.step in (1, 2):
        state.images_seen = 32 * state.step
        folder = tmp_path / checkpoint.name_at(state.images_seen)
        checkpoint.write(state.snapshot(tiny, {"run_key": "a", "data_fingerprint": "b"}), folder)
    forge_json(folder, "state.json", forged)
    warnings: list[str] = []
    with checkpoint_manager.latest_valid(run, 0.0, warnings.append) as found:
        assert found == tmp_path / checkpoint.name_at(32)
    (warning,) = warnings
    assert message in warning
