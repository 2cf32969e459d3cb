"""python jobs/sample.py from the command line, also when it is killed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import Job, kill_tree
from support.servers import RayHead
from support.tiny import TINY_NET

import ddpm
from ddpm.build import with_sampler
from ddpm.config.json import override
from ddpm.config.tree import SampleConfig
from ddpm.runs import checkpoint
from ddpm.training.state import State

CHANGES = {"schedule.num_timesteps": 50, "sample.num_sample_steps": 20}
TINY = override(TINY_NET, {**CHANGES, "model.num_classes": 3, "model.zero_init": False})


@pytest.fixture(autouse=True)
def run(tmp_path: Path) -> None:
    """A run with one checkpoint."""
    state = State.create(TINY, torch.device("cpu"))
    identity = checkpoint.identity(TINY, "", "", ("bags", "boots", "blue coats"))
    checkpoint.write(state.snapshot(TINY, identity), tmp_path / "run/checkpoint-000000000000-g1")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_samples_from_a_run_into_a_folder_named_by_run_and_seed(
    run_job: Callable[..., Any], tmp_path: Path
) -> None:
    done = run_job(
        *("sample", "run", "--num-images", "3", "--seed", "4", "--trajectory"),
        *("--sampler", "dpmpp_2m", "--num-sample-steps", "2"),
        *("--guidance-scale", "2", "--guidance-interval", "0.5", "2"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "samples/run-seed4"
    assert done.stdout.splitlines()[-3:] == [
        f"images      {out}/images",
        f"grid        {out}/grid.png",
        f"trajectory  {out}/trajectory.gif",
    ]
    with Image.open(out / "trajectory.gif") as gif, Image.open(out / "trajectory.png"):
        assert gif.is_animated
    assert len(list((out / "images").iterdir())) == 3


def test_a_label_is_a_name_or_a_number(run_job: Callable[..., Any], tmp_path: Path) -> None:
    drawn = {}
    for label in ("blue coats", "2"):
        done = run_job("sample", "run", "--num-images", "2", "--label", label, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        drawn[label] = files(tmp_path / f"samples/run-{label.replace(' ', '-')}-seed0")
    assert drawn["blue coats"] == drawn["2"]


def test_user_errors_are_one_line_with_exit_code_2(user_error: Callable[..., str], tmp_path: Path) -> None:
    for flags, message in (
        (["nothing-here"], "does not exist"),
        (["run", "--sampler", "mix"], "mix cannot undo the process gaussian"),
        (["run", "--num-sample-steps", "51"], "num_sample_steps is 51"),
        (["run", "--label", "3"], "bags, boots, blue coats"),
        (["run", "--sampler", "heun", "--eta", "0.5"], "--eta has no effect here"),
        (["run", "--sampler", "ddpm", "--variance", "learned"], "this net did not learn it"),
        (["run", "--sampler", "ddpm", "--variance", "measured"], "--variance"),
        (["run", "--dynamic-threshold", "0.9"], "--dynamic-threshold"),
        (["run", "--sigma-min", "0.1"], "--sigma-min has no effect here"),
        (["run", "--guidance-interval", "0.5", "2"], "--guidance-interval has no effect here"),
    ):
        assert message in user_error("sample", *flags, "--out", "refused")
        assert not (tmp_path / "refused").exists()


def test_a_killed_job_can_be_resumed(run_job: Callable[..., Any], tmp_path: Path) -> None:
    """After a SIGKILL, the same command ends with the files of an undisturbed one."""
    flags = "run --num-images 2000 --num-sample-steps 6 --batch-size 64".split()
    with Job("sample", *flags, "--out", "killed", log=tmp_path / "job.log") as job:
        job.wait_for(lambda: len(list((tmp_path / "killed").glob("images/*.png"))) > 0)
        kill_tree(job.process)
    kept_before = files(tmp_path / "killed")
    assert "grid.png" not in kept_before
    for out in ("killed", "undisturbed"):
        done = run_job("sample", *flags, "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first == "images 0/2,000"
    whole = files(tmp_path / "killed")
    assert whole == files(tmp_path / "undisturbed")
    names = [name for name in kept_before if not Path(name).name.startswith((".", "_")) and name in whole]
    assert len(names) > 1 and all(kept_before[name] == whole[name] for name in names)


@pytest.mark.slow
def test_a_cluster_samples_the_same_images_as_one_core(
    run_job: Callable[..., Any], ray_head: RayHead, tmp_path: Path
) -> None:
    """Weights are sent to the workers and images are sent back, so the cluster need not see this folder."""
    flags = "run --num-images 40 --num-sample-steps 3 --batch-size 8".split()
    for out, more, env in (
        ("cluster", [], {"RAY_ADDRESS": ray_head.address}),
        ("alone", ["--num-workers", "1"], {}),
    ):
        done = run_job("sample", *flags, *more, "--out", out, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "cluster") == files(tmp_path / "alone")


def test_ddpm_takes_all_steps_of_a_run_that_samples_in_few(
    run_job: Callable[..., Any], tmp_path: Path
) -> None:
    drawn = []
    for name, flags in (
        ("all", []),
        ("same", ["--num-sample-steps", "50"]),
        ("few", ["--num-sample-steps", "20"]),
    ):
        words = ("sample", "run", "--num-images", "2", "--sampler", "ddpm", "--out", name, *flags)
        done = run_job(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        drawn.append({key: data for key, data in files(tmp_path / name).items() if key.startswith("images/")})
    assert drawn[0] == drawn[1] != drawn[2]
    pixels = ddpm.Run(str(tmp_path / "run")).sample(2, sampler="ddpm")
    assert (pixels[0, ..., 0] == np.asarray(Image.open(tmp_path / "all/images/000000.png"))).all()


@pytest.mark.parametrize(
    ("own", "sampler", "steps"),
    [("auto", "ddpm", None), ("ddpm", "ddpm", 20), ("ddim", "dpmpp_2m", 20), ("ddim", None, 20)],
)
def test_the_steps_of_another_sampler(own: str, sampler: str | None, steps: int | None) -> None:
    sample = SampleConfig(sampler=own, num_sample_steps=20)
    changed = with_sampler(sample, sampler, TINY.objective)
    assert (changed.sampler, changed.num_sample_steps) == (sampler or own, steps)
