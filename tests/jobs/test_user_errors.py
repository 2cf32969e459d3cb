"""A user's mistake is one line and exit code 2 at every job, before anything is written."""

from collections.abc import Callable
from pathlib import Path

import pytest

MISTAKES = {
    "train digits --model.norm-groups 7": "norm_groups",
    "train digits --train.batch-size 100": "micro_batch_size 64",
    "train digits --model.image-size 32": "--model.attention-resolutions 16",
    "train digits --cluster.num-workers 3": "3 workers",
    "train cifar10": "train.py cifar10 --data shards/cifar10",
    "train digits --objective.process uniform_mix --objective.variance learned": "uniform_mix",
    "train digits --model.num-classes 10 --sample.guidance-scale 2 --objective.label-dropout 0": "label_dropout was 0",
    "train digits --sample.sampler mix": "sampler mix",
    "train digits --run.storage gs://b/runs": "unknown scheme",
    "train digits --run.name a/b": "run.name",
    "train digits --data none": "ddpm prepare",
    "prepare digits": "URI",
    "prepare fashion-mnist data --path none": "--path",
    "prepare folder data --path none --size 16": "none is not a folder",
    "prepare torchvision data --dataset cifar10": "cifar-10-batches-",
    "evaluate": "no CHECKPOINT is given",
    "evaluate none": "none does not exist",
    "compare": "no RUN is given",
    "compare none": "none does not exist",
    "compare there": "run.json",
    "compare there --out there": "--out there is a folder",
    "compare there --evaluations none": "--evaluations none",
    "compare there --evaluations there/card.json": "card.json",
    "export c there": "there exists",
    "export c out --format pt2 --label 3": "--format pt2",
    "export c out --alias champion": "--alias",
    "export c out --register name --no-ema": "averaged weights",
    "export c out": "c does not exist",
    "ui --port 70000": "port is 70000",
    "ui --port 5001": "MLflow at http://127.0.0.1:9: ",
    "sync none": "run.json",
    "sync gs://bucket/run": "unknown scheme",
}


@pytest.mark.parametrize("command_line", MISTAKES)
def test_a_mistake_is_one_line(
    user_error: Callable[..., str], tmp_path: Path, command_line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for limit in ("MAX_RETRIES", "TIMEOUT"):  # which `ui` sets, if they are not set
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{limit}", "1")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/card.json").write_text('{"format": "another"}')
    assert MISTAKES[command_line] in user_error(*command_line.split()) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
