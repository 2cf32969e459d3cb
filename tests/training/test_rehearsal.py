"""The tests for a GPU pass on its stand-in (support/cpu_as_gpu.py): what a GPU would refuse is found without one."""

import shutil
import sys
from pathlib import Path

import pytest
from support.processes import REPO, python_path, run


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in for a GPU is compiled by g++")
def test_the_tests_for_a_gpu_pass_on_its_stand_in(tmp_path: Path) -> None:
    # Left out: what starts Ray or compiles, and most of the runs that are killed and resumed, which take long.
    words = ["-p", "support.cpu_as_gpu", "-k", "not (killed or jobs or two_workers) or 0.2-False-bfloat16"]
    command = [sys.executable, "-m", "pytest", "tests/gpu", *words, "-p", "no:cacheprovider", "-n0"]
    done = run([*command, f"--basetemp={tmp_path / 'gpu'}"], cwd=REPO, env=python_path(REPO / "tests"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
