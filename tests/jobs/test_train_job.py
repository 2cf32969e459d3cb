"""python jobs/train.py from the command line: what it imports before it may start; the same command is the same run."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import processes, tracked
from support.processes import Job

from ddpm.config.json import flatten, from_json
from ddpm.config.presets import DIGITS
from ddpm.runs import checkpoint, curves, run_folder


@pytest.mark.parametrize(
    ("job", "flags", "unneeded"),
    [
        ("train", ["--train.batch-size", "100"], ("torch", "ray")),
        ("search", ["--train.batch-size", "100"], ("torch", "ray")),
        ("train", ["--model.image-size", "32"], ("ray",)),
    ],
)
def test_user_errors_are_reported_before_heavy_imports(
    run_job: Callable[..., Any], tmp_path: Path, job: str, flags: list[str], unneeded: tuple[str, ...]
) -> None:
    done = run_job(job, "digits", *flags, cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 2
    assert not re.findall(rf"\| +(?:{'|'.join(unneeded)})$", done.stderr, re.MULTILINE)


PRESETS = ("digits", "fashion-mnist", "folder", "cifar10", "celeba64")


@pytest.mark.parametrize(
    ("words", "shown"), [(["train"], PRESETS), (["search", "digits"], ("--max-concurrent", "--lr"))]
)
def test_help_is_fast(
    run_job: Callable[..., Any], tmp_path: Path, words: list[str], shown: tuple[str, ...]
) -> None:
    done = run_job(*words, "--help", cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0 and all(word in done.stdout for word in shown)
    assert " ray" not in done.stderr and " torch" not in done.stderr, "--help imports what it does not need"


TINY = """--data.window-rows 200 --schedule.num-timesteps 50 --model.base-width 8 --model.width-multipliers 1 2
    --model.norm-groups 4 --train.batch-size 32 --train.micro-batch-size 8 --train.log-every-images 32
    --train.checkpoint-every-images 64 --train.held-out-images 8 --sample.num-images 4 --sample.num-sample-steps 5
    --train.total-images 128 --cluster.num-workers 1""".split()
"""The command that is typed again and again."""


@pytest.fixture
def train(run_job: Callable[..., Any], digits_uri: str, tmp_path: Path) -> Callable[..., str]:
    def train(*flags: str, code: int = 0) -> str:
        """What `python jobs/train.py digits` prints, in an empty folder at first."""
        done = run_job("train", "digits", "--data.shards", digits_uri, *TINY, *flags, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return str(done.stdout + done.stderr)

    return train


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
def test_without_tracking_mlflow_is_not_even_imported_and_the_run_can_be_sent_later(
    run_job: Callable[..., Any], digits_uri: str, tmp_path: Path
) -> None:
    words = ("--data.shards", digits_uri, *TINY, "--name", "a", "--run.tracking", "none")
    env = {"MLFLOW_TRACKING_URI": "", "PYTHONPROFILEIMPORTTIME": "1"}
    done = run_job("train", "digits", *words, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "trained     128 images" in done.stdout and "MLflow" not in done.stdout + done.stderr
    assert not re.findall(r"\| +mlflow$", done.stderr, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir() if "mlflow" in path.name or path.name == "mlruns"] == []
    done = run_job("sync", "runs/a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    key = run_folder.existing_run(str(tmp_path / "runs/a")).key
    assert tracked.run_with_key(os.environ["MLFLOW_TRACKING_URI"], key).info.status == "FINISHED"


def names(folder: Path) -> set[str]:
    return {file.parent.name for file in folder.glob("runs/*/run.json")}


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
def test_the_same_command_is_the_same_run(
    train: Callable[..., str],
    digits_uri: str,
    mlflow_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Typed again, it says that the run is finished, and trains nothing. Another setting is another run, and only a
    name extends one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    text = train()
    (name,) = names(tmp_path)
    assert re.fullmatch(r"digits-[0-9a-f]{8}", name) and "trained     128 images" in text
    run = run_folder.existing_run(str(tmp_path / "runs" / name))
    card = run_folder.read_card(run.location)
    status = run_folder.read_status(run.location)
    assert status is not None and (status.status, status.images_seen) == ("FINISHED", 128)
    assert card.preset == "digits" and card.command.endswith(" ".join(TINY))
    assert card.changed["model.base_width"] == 8 and card.changed["train.total_images"] == 128
    assert card.data is not None and card.changed["data"] == card.data.fingerprint
    assert (card.data.num_images, card.data.shape, card.data.uri) == (600, (8, 8, 1), digits_uri)
    assert {"version.ddpm", "version.torch", "version.ray"} <= card.versions.keys()
    assert from_json(json.dumps(card.config)) == checkpoint.read_config(newest(run))
    before = contents(run)

    for flags in ((), ("--train.log-every-images", "64", "--sampler", "ddpm")):
        text = train(*flags)
        assert f"run {name} is finished" in text and "trained     " not in text
        assert ("no effect   --train.log-every-images 64, --sample.sampler ddpm" in text) == bool(flags)
    assert names(tmp_path) == {name} and contents(run) == before
    tracked.run_with_key(mlflow_server, run.key)  # one

    assert "trained     128 images" in train("--seed", "1")
    assert len(names(tmp_path)) == 2

    assert "trained     128 images" in train("--name", "longer")
    assert "trained     192 images" in train("--name", "longer", "--total-images", "192")
    assert {name, "longer"} < names(tmp_path) and len(names(tmp_path)) == 3
    longer = run_folder.existing_run(str(tmp_path / "runs/longer"))
    assert run_folder.read_card(longer.location).changed["train.total_images"] == 128  # as it began
    assert [point.images_seen for point in curves.read(longer.location)["train/loss"]] == list(
        range(32, 193, 32)
    )

    # A user renames the folder of a run to the name of another one.
    (of_seed_1,) = names(tmp_path) - {name, "longer"}
    (tmp_path / "runs" / name).rename(tmp_path / "kept")
    (tmp_path / "runs" / of_seed_1).rename(tmp_path / "runs" / name)
    text = train(code=2)
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "train.seed 1" in error and "--run.name" in error and card.versions["version.ddpm"] in error


def newest(run: run_folder.RunFolder) -> Path:
    return Path(run_folder.checkpoints(run.location)[-1].path)


def contents(run: run_folder.RunFolder) -> dict[str, bytes]:
    """All files of a run."""
    files = [path for path in Path(run.location.path).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
def test_a_stopped_command_is_resumed_by_itself_and_in_python(digits_uri: str, tmp_path: Path) -> None:
    """Also with another interval of logging; run.json stays as it was, and so does the number of workers."""
    long = ["--train.total-images", "6400", "--train.log-every-images", "320", "--workers", "auto"]
    words = ["digits", "--data.shards", digits_uri, *TINY, *long]
    log = tmp_path / "job.log"
    with Job("train", *words, log=log) as job:
        job.wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint-*/checksums.json")))
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 128 + signal.SIGTERM, job.output
    (name,) = names(tmp_path)
    run = run_folder.existing_run(str(tmp_path / "runs" / name))
    card = run.location.child(run_folder.CARD).read()
    status = run_folder.read_status(run.location)
    assert status is not None and status.status == "STOPPED" and status.ended_ms is not None
    assert 0 < status.images_seen < 6400
    cluster = run_folder.read_card(run.location).config["cluster"]
    assert (cluster["num_workers"], cluster["threads_per_worker"]) == (2, 1)  # 3 CPUs, 4 micro-batches
    with Job("train", *words, "--train.log-every-images", "160", log=log) as job:
        assert job.wait() == 0, job.output
    assert checkpoint.read_config(newest(run)).cluster.num_workers == 2
    assert names(tmp_path) == {name} and run.location.child(run_folder.CARD).read() == card
    table = curves.read_rows(run.location)
    points = {(row["name"], row["images_seen"]) for row in table.to_pylist()}
    assert len(points) == table.num_rows and ("train/loss", 6400) in points
    steps = {step for name, step in points if name == "train/loss"}
    assert steps <= set(range(160, 6401, 160)) and len(steps) > 20

    done = processes.run([sys.executable, "-c", IN_PYTHON.format(digits_uri)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == run.location.uri and names(tmp_path) == {name}


IN_PYTHON = """
import ddpm

schedule, sample = dict(num_timesteps=50), dict(num_images=4, num_sample_steps=5)
model = dict(base_width=8, width_multipliers=[1, 2], norm_groups=4)
train = dict(micro_batch_size=8, held_out_images=8)
run = ddpm.train("digits", {!r}, schedule=schedule, model=model, train=train, sample=sample,
    batch_size=32, total_images=6400, **{{"data.window_rows": 200}})
print(run.uri)
"""


def test_a_dry_run_prints_the_configuration_and_starts_nothing(
    run_job: Callable[..., Any], tmp_path: Path
) -> None:
    words = ("digits", "--lr", "0.5", "--train.forward-images", "32", "--dry-run")
    done = run_job("train", *words, cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0 and not re.findall(r"\| +ray$", done.stderr, re.MULTILINE)
    first, second, *lines = done.stdout.splitlines()
    assert "627,433 weights" in first and "2 micro-batches" in first and "a pass of 32 images" in first
    took = (
        r"time        0.055 GFLOP an image; [\d.]+ (s|min) on .* \([\d,]+ images/s, measured for a second\)"
    )
    assert re.fullmatch(took, second)
    shown = dict(line.split(" = ") for line in lines)
    assert shown.keys() == flatten(DIGITS).keys()
    assert (shown["optim.lr"], shown["cluster.num_workers"]) == ("0.5", "auto")
    assert re.fullmatch(r"digits-[0-9a-f]{8}", shown["run.name"])
    assert list(tmp_path.iterdir()) == []
