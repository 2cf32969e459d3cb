"""python jobs/train.py from the command line: user errors are one line, before anything is written."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BAD = {
    "unknown preset": (["cifar11"], "cifar11"),
    "unknown flag": (["digits", "--optim.learning-rate", "1"], "--optim.learning-rate"),
    "unknown choice": (["digits", "--schedule.kind", "warp"], "warp"),
    "schedule out of range": (["digits", "--schedule.num-timesteps", "0"], "num_timesteps"),
    "net that cannot be": (["digits", "--model.norm-groups", "7"], "norm_groups"),
    "batch that does not divide": (
        ["digits", "--train.batch-size", "100"],
        "100 is not a positive multiple of micro_batch_size 64",
    ),
    "no attention at this size": (
        ["digits", "--model.image-size", "32"],
        "--model.attention-resolutions 16\n",
    ),
    "workers that cannot share": (["digits", "--cluster.num-workers", "3"], "3 workers cannot share evenly"),
    "files that are elsewhere": (["cifar10"], "train.py cifar10 --data.shards shards/cifar10`\n"),
    "no such sampler": (["digits", "--sample.sampler", "mix"], "mix cannot undo the process gaussian"),
    "unknown scheme": (["digits", "--run.storage", "gs://b/runs"], "unknown scheme"),
    "name that is no folder": (["digits", "--run.name", "a/b"], "run.name"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=list(BAD))
def test_user_errors_are_one_line_with_exit_code_2(
    run_job: Callable[..., Any], tmp_path: Path, flags: list[str], message: str
) -> None:
    done = run_job("train", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_an_error_that_says_how_to_prepare_it(
    run_job: Callable[..., Any], tmp_path: Path
) -> None:
    done = run_job("train", "digits", "--data.shards", str(tmp_path / "none"), cwd=tmp_path)
    assert done.returncode == 2
    assert "it has no manifest.json; make one with `python jobs/prepare.py SOURCE" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


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


def test_help_is_fast_and_lists_every_preset(run_job: Callable[..., Any], tmp_path: Path) -> None:
    done = run_job("train", "--help", cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    for preset in ("digits", "glyphs", "fashion-mnist", "cifar10", "celeba64"):
        assert preset in done.stdout
    assert " ray" not in done.stderr and " torch" not in done.stderr, "--help imports what it does not need"
