"""Sampling with killed workers: in the end the folder has the files that one undisturbed process writes."""

import dataclasses
import os
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import processes
from support.processes import Job
from support.tiny import TINY_NET

from ddpm.build import TrainedNet, build_net
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.runs.storage import resolve
from ddpm.sampling import generate, workers
from ddpm.sampling.workers import SampleJob
from ddpm.utils import images, process
from ddpm.utils.errors import UserError

TINY = override(
    TINY_NET, {"schedule.num_timesteps": 50, "model.zero_init": False, "sample.num_sample_steps": 4}
)
BILLION = 10**9
CONDITIONAL = override(TINY, {"model.num_classes": 3})


def job_of(config: Config, **settings: Any) -> SampleJob:
    return SampleJob(TrainedNet(build_net(config), config), **settings)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sample_into(out: Path, job: SampleJob, num_images: int = 21, **settings: Any) -> dict[str, bytes]:
    """Sample images in pieces of 4; returns the files in `out`."""
    job = dataclasses.replace(job, batch_size=job.batch_size or 4)
    workers.draw(job, resolve(str(out)), num_images, **settings)
    return files(out)


def positions(progress: list[int]) -> dict[str, Any]:
    """Settings that sample with one worker, and append the numbers of existing images to `progress`."""
    return {"num_workers": 1, "show": lambda done, _: progress.append(done)}


@pytest.mark.usefixtures("ray_here")
def test_two_workers_sample_the_same_images_as_one(tmp_path: Path) -> None:
    """Bit for bit, also when a worker is killed, and with threads of one process."""
    job = job_of(override(CONDITIONAL, {"schedule.num_timesteps": 100, "sample.num_sample_steps": 100}))
    alone = sample_into(tmp_path / "one", job, num_workers=1)
    assert len(alone) == 21 + 2
    victims: list[int] = []

    def kill_one(done: int, detail: str) -> None:
        if done and not victims:
            busy = processes.wait_for(lambda: processes.members(os.getpid(), "ray::run_piece"))
            victims.append(busy[0].pid)
            busy[0].kill()

    assert sample_into(tmp_path / "two", job, num_workers=2, show=kill_one) == alone
    assert len(victims) == 1
    assert sample_into(tmp_path / "threads", job) == alone


def test_ctrl_c_ends_sampling_within_a_piece(tmp_path: Path) -> None:
    """Every piece of this request takes many minutes."""
    settings = ["--sampler", "ddpm", "--num-sample-steps", 1000, "--batch-size", 512, "--num-images", 2048]
    out = tmp_path / "out"
    with Job("sample", "builtin:fashion-mnist", *settings, "--out", out, log=tmp_path / "log") as job:
        job.wait_for(lambda: (out / "request.json").exists())
        job.process.send_signal(signal.SIGINT)
        assert job.wait() == 130
        assert job.output.splitlines()[-1] == "interrupted"


def test_png_i_is_image_i(tmp_path: Path) -> None:
    progress: list[tuple[int, str]] = []
    job = job_of(TINY)
    found = sample_into(tmp_path, job, 10, num_workers=1, show=lambda *news: progress.append(news))
    assert set(found) == {"request.json", "grid.png", *(f"images/{i:06d}.png" for i in range(10))}
    assert [done for done, _ in progress] == [0, 4, 8, 10]
    assert all(detail.endswith(" images/s") for _, detail in progress[1:])
    trained = TrainedNet(build_net(TINY).eval(), TINY)
    torch.set_num_threads(1)
    expected = [generate.draw(trained, piece).numpy() for piece in (range(4), range(4, 8), range(8, 10))]
    read = [images.from_png(found[f"images/{i:06d}.png"]) for i in range(10)]
    assert np.array_equal(read, np.concatenate(expected))
    assert found["grid.png"] == images.png_bytes(images.grid(np.stack(read)))


class Killed(BaseException):
    """Stands for the death of the process."""


def test_existing_images_are_not_sampled_again(tmp_path: Path) -> None:
    job = job_of(CONDITIONAL)
    undisturbed = sample_into(tmp_path / "undisturbed", job)

    def interrupt(done: int, detail: str) -> None:
        if done >= 12:
            raise Killed

    with pytest.raises(Killed):
        sample_into(tmp_path / "killed", job, num_workers=1, show=interrupt)
    assert "grid.png" not in files(tmp_path / "killed")
    progress: list[int] = []
    again = sample_into(tmp_path / "killed", job, **positions(progress))
    assert progress == [12, 16, 20, 21]
    assert again == undisturbed
    progress.clear()
    assert sample_into(tmp_path / "killed", job, **positions(progress)) == undisturbed
    assert progress == [21]


def test_a_larger_request_adds_images(tmp_path: Path) -> None:
    job = job_of(TINY)
    sample_into(tmp_path / "grown", job, 10)
    progress: list[int] = []
    grown = sample_into(tmp_path / "grown", job, 21, **positions(progress))
    assert progress[0] == 8  # the piece with two of four images is sampled again as a whole
    assert grown == sample_into(tmp_path / "at-once", job, 21)


def test_lost_and_incomplete_images_are_sampled_again(tmp_path: Path) -> None:
    job = job_of(TINY)
    whole = sample_into(tmp_path, job)
    gone = f".000005.png.{process.token()}0.1.tmp"  # a temporary file of a process that has exited
    (tmp_path / "images/000005.png").rename(tmp_path / "images" / gone)
    (tmp_path / "images/000020.png").unlink()
    assert sample_into(tmp_path, job) == whole


def test_another_request_is_a_user_error(tmp_path: Path) -> None:
    job = job_of(TINY)
    before = sample_into(tmp_path / "a", job, 2)
    others = [
        (job_of(override(TINY, {"sample.seed": 1})), r"sample\.seed 0 \(now 1\)"),
        (job_of(override(TINY, {"train.seed": 1})), r"weights \w+ \(now \w+\)"),
        (job_of(TINY, batch_size=5), r"batch_size 4 \(now 5\)"),
    ]
    for other, message in others:
        with pytest.raises(UserError, match=f"a holds images of another request: .*{message}.*another --out"):
            sample_into(tmp_path / "a", other, 2)
    assert files(tmp_path / "a") == before
    sample_into(tmp_path / "a", job_of(override(TINY, {"sample.sampler": "ddim", "sample.num_images": 9})), 2)
    (tmp_path / "b/images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"b has images but no request\.json"):
        sample_into(tmp_path / "b", job, 2)
    (tmp_path / "a/request.json").write_text("{")
    with pytest.raises(UserError, match=r"request\.json is damaged"):
        sample_into(tmp_path / "a", job, 2)


def test_a_request_for_a_billion_images_needs_little_memory(tmp_path: Path) -> None:
    def interrupt(done: int, detail: str) -> None:
        if done >= 12:
            raise Killed

    for _ in range(2):  # the second time some images exist
        tracemalloc.start()
        try:
            with pytest.raises(Killed):
                sample_into(tmp_path, job_of(TINY), BILLION, num_workers=1, show=interrupt)
            assert tracemalloc.get_traced_memory()[1] < 50 << 20
        finally:
            tracemalloc.stop()


def test_labels_are_checked() -> None:
    with pytest.raises(UserError, match="label is 3; this net was trained without labels"):
        job_of(TINY, label=3)
    with pytest.raises(UserError, match=r"label is 3; it must be in 0\.\.2"):
        job_of(CONDITIONAL, label=3)


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cannot write images to .*/file/out; run the same command again to continue: "
    ):
        sample_into(tmp_path / "file/out", job_of(TINY))


def test_a_bucket_gets_the_same_files_as_a_folder(s3_bucket: str, tmp_path: Path) -> None:
    here = sample_into(tmp_path, job_of(TINY), 9, with_trajectory=True)
    there = resolve(f"{s3_bucket}/drawn")
    for _ in range(2):
        workers.draw(job_of(TINY, batch_size=4), there, 9, with_trajectory=True)
    assert {name: there.child(name).read() for name in here} == here


def test_images_of_a_sampler_in_code_are_drawn_in_memory_alone(tmp_path: Path) -> None:
    """request.json, by which a request is continued, cannot say what they are."""
    job = job_of(TINY, sampler=lambda denoise, noise, on_step=None: noise())
    assert workers.in_memory(job, 5).shape == (5, 8, 8, 1)
    with pytest.raises(ValueError, match="sampler is given"):
        sample_into(tmp_path / "out", job, 5)
