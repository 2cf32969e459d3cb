"""examples/classifier, run as by a user."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import examples
from support.processes import Background, run_job

pytestmark = pytest.mark.slow


def checkpoints(results: Path) -> list[Path]:
    """The checkpoints that Ray Train has registered, in order."""
    return sorted(results.glob("classifier/checkpoint_*/state.pt"))


@pytest.mark.long
def test_a_classifier_ends_with_the_same_weights_after_a_worker_is_killed(tmp_path: Path) -> None:
    assert run_job("prepare", "digits", tmp_path / "shards").returncode == 0

    def final_checkpoint(name: str, kill: bool) -> dict[str, Any]:
        results = tmp_path / name
        command = [
            sys.executable,
            str(examples.FOLDER / "classifier/train_classifier.py"),
            "shards",
            str(results),
        ]
        with Background(command, log=tmp_path / f"{name}.log", cwd=tmp_path) as job:
            if kill:
                job.wait_for(lambda: len(checkpoints(results)) >= 2)
                (before := job.members("ray::RayTrainWorker"))[1].send_signal(signal.SIGKILL)
                job.wait_for(lambda: len(set(job.members("ray::RayTrainWorker")) - set(before)) == 2)
            assert job.wait() == 0, job.output
        assert "'images_seen': 102400" in job.output
        return torch.load(checkpoints(results)[-1], weights_only=True)

    killed = final_checkpoint("killed", kill=True)
    undisturbed = final_checkpoint("undisturbed", kill=False)
    assert killed["images_seen"] == undisturbed["images_seen"] == 102_400
    assert killed["net"].keys() == undisturbed["net"].keys()
    assert all(torch.equal(killed["net"][name], value) for name, value in undisturbed["net"].items())
