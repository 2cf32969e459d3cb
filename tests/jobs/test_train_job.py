"""python jobs/train.py from the command line: what it imports before it knows that it may start."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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


PRESETS = ("digits", "glyphs", "fashion-mnist", "folder", "cifar10", "celeba64")


@pytest.mark.parametrize(
    ("words", "shown"), [(["train"], PRESETS), (["search", "digits"], ("--max-concurrent", "--lr"))]
)
def test_help_is_fast(
    run_job: Callable[..., Any], tmp_path: Path, words: list[str], shown: tuple[str, ...]
) -> None:
    done = run_job(*words, "--help", cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0 and all(word in done.stdout for word in shown)
    assert " ray" not in done.stderr and " torch" not in done.stderr, "--help imports what it does not need"
