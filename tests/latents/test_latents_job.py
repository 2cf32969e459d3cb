"""From photographs to a trained net of latents, through the command line; the promises of a run hold on latents."""

import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.job_submission import JobSubmissionClient
from support import local
from support.autoencoders import CHANNELS, SIZE, write_autoencoder, write_photos
from support.processes import Job, kill_tree, members, run_job, wait_for, write_checkout
from support.servers import RayHead, S3Server
from torch import Tensor

from ddpm.data.manifest import MANIFEST, read_manifest
from ddpm.data.ray_stream import open_data_set
from ddpm.runs import names, run_folder, storage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_ray_head")]

FLAGS = """--model.base-width 8 --model.norm-groups 4 --model.attention-resolutions 4 --schedule.num-timesteps 50
    --train.checkpoint-every-images 64 --train.log-every-images 64 --train.precision float32 --train.compile False
    --sample.num-images 4 --sample.num-sample-steps 3 --workers 2 --cluster.threads-per-worker 1""".split()


def done(*words: str, cwd: Path, env: dict[str, str] | None = None) -> Any:
    result = run_job(*words, cwd=cwd, env=env)
    assert result.returncode == 0, result.stderr + result.stdout
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, ray_head: RayHead) -> Path:
    """A folder with `photos`, the autoencoder `vae` and the data sets `pixels` and `latents`."""
    place = tmp_path_factory.mktemp("latents")
    write_photos(place / "photos")
    write_autoencoder(place / "vae")
    done("prepare", "folder", "pixels", "--path", "photos", "--size", str(SIZE), cwd=place)
    output = encode(place, "latents", env={"RAY_ADDRESS": ray_head.address}).stdout
    assert "latents     8x8 in 4 channels, of images of 16x16" in output
    return place


def encode(place: Path, out: str, *flags: str, env: dict[str, str] | None = None) -> Any:
    return done("encode", "pixels", out, "--autoencoder", "diffusers:vae", *flags, cwd=place, env=env)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_set_of_latents(place: Path) -> None:
    """It has the rows of the images in their order; made again, also after a kill, it is the same."""
    manifest = read_manifest(storage.resolve(str(place / "latents")))
    pixels = read_manifest(storage.resolve(str(place / "pixels")))
    assert manifest.shape == (8, 8, CHANNELS) and manifest.class_names == pixels.class_names
    assert manifest.latents is not None and manifest.latents.pixels_fingerprint == pixels.fingerprint
    for split in pixels.splits:
        ours, theirs = (open_data_set(str(place / name), split) for name in ("latents", "pixels"))
        n = theirs.rows.num_rows
        encoded, images = (each.fixed_order().read(0, n) for each in (ours, theirs))
        assert (encoded.label == images.label).all()
        # The brightness of an image is in its latents: rows are in one order.
        of_latents = encoded.image.reshape(n, -1).astype(float)
        of_images = images.image.reshape(n, -1).mean(1)
        design = np.c_[of_latents.reshape(n, 64, CHANNELS).mean(1), np.ones(n)]
        fitted = design @ np.linalg.lstsq(design, of_images, rcond=None)[0]
        assert np.corrcoef(fitted, of_images)[0, 1] > 0.9
    first = content(place / "latents")
    assert "exists already" in encode(place, "latents").stdout
    (place / "latents" / MANIFEST).unlink()
    (place / "latents/train/00000.parquet").unlink()
    (place / "latents/_prepare").mkdir()
    options = json.loads(first[MANIFEST])["options"]
    (place / "latents/_prepare/options.txt").write_text(options)
    encode(place, "latents")
    assert content(place / "latents") == first
    encode(place, "mirrored", "--mirror")
    mirrored = read_manifest(storage.resolve(str(place / "mirrored")))
    twice = {"train": 2 * pixels.splits["train"].num_rows, "test": pixels.splits["test"].num_rows}
    assert {name: split.num_rows for name, split in mirrored.splits.items()} == twice


def test_a_run_on_latents_killed_and_resumed_is_the_run_that_was_not(place: Path) -> None:
    words = ("folder", "--data", str(place / "latents"), *FLAGS, "--total-images", "256")
    done("train", *words, "--name", "undisturbed", cwd=place)
    with Job(
        "train", *words, "--name", "killed", "--storage", str(place / "runs"), log=place / "job.log"
    ) as job:
        run = storage.resolve(str(place / "runs/killed"))
        job.wait_for(lambda: run_folder.checkpoints(run))
        kill_tree(job.process)
    done("train", *words, "--name", "killed", cwd=place)
    newest = [
        Path(run_folder.checkpoints(storage.resolve(str(place / "runs" / name)))[-1].path)
        for name in ("undisturbed", "killed")
    ]
    local.assert_same(local.stored(newest[1]), local.stored(newest[0]))
    config = json.loads((newest[0] / "config.json").read_text())
    assert config["data"]["latents"] and config["data"]["x_0_max"] in (1.5, 2.0, 2.5, 3.0)
    assert config["model"]["image_size"] == 8 and config["model"]["num_classes"] == 2

    # What shows or judges an image decodes.
    with Image.open(place / "runs/undisturbed/samples/latest.png") as grid:
        assert grid.size[0] > 2 * SIZE
    done("sample", "runs/undisturbed", "--num-images", "2", "--label", "dark", "--out", "drawn", cwd=place)
    with Image.open(place / "drawn/images/000000.png") as image:
        assert image.size == (SIZE, SIZE) and image.mode == "RGB"
    options = ("--num-images", "20", "--features", "pixels", "--num-sample-steps", "2")
    output = done("evaluate", "runs/undisturbed", *options, cwd=place).stdout
    assert "KID-pixels" in output and f"bits/dim-latents-{config['data']['latents'][:8]}" in output

    # A net that sees the pixels is judged by the same images, and its bits are of something else.
    words = ("folder", "--data", str(place / "pixels"), *FLAGS, "--data.augment", "0")
    done("train", *words, "--total-images", "64", "--name", "pixels", cwd=place)
    done("evaluate", "runs/pixels", *options, cwd=place)
    verdicts = done("compare", "runs/undisturbed", "runs/pixels", cwd=place).stdout
    assert "KID-pixels: " in verdicts and "bits/dim: " not in verdicts, verdicts
    # The images are gone, which metrics need; sampling does not.
    shutil.move(place / "pixels", place / "moved")
    try:
        refused = run_job("evaluate", "runs/undisturbed", *options, cwd=place)
        assert refused.returncode == 2 and "no data set at" in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
        done("sample", "runs/undisturbed", "--num-images", "1", "--out", "one", cwd=place)
    finally:
        shutil.move(place / "moved", place / "pixels")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with `photos` and the autoencoder `vae`."""
    folder = write_checkout(tmp_path / "checkout")
    write_photos(folder / "photos")
    write_autoencoder(folder / "vae")
    return folder


@pytest.fixture
def submit(s3_server: S3Server, s3_bucket: str, ray_head: RayHead, checkout: Path) -> Callable[..., str]:
    """`ray job submit -- python ...` from the checkout, which Ray copies; returns the output."""
    env = s3_server.client_env | {"OMP_NUM_THREADS": "1"}
    env["MLFLOW_TRACKING_URI"] = os.environ["MLFLOW_TRACKING_URI"]

    def submit(*command: object, options: Sequence[str] = ()) -> str:
        submitted = ray_head.submit("python", *command, env=env, cwd=checkout, options=options)
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        return submitted.stdout

    return submit


@pytest.mark.long
def test_from_photographs_to_verdicts_in_a_bucket(
    submit: Callable[..., str], s3_bucket: str, ray_head: RayHead, checkout: Path, tmp_path: Path
) -> None:
    """Every stage is a submitted job; what the next one needs is in the bucket alone."""
    pixels, latents, runs = (f"{s3_bucket}/{name}" for name in ("photos", "photos-latents", "runs"))
    submit("jobs/prepare.py", "folder", pixels, "--path", "photos", "--size", SIZE)
    submit("jobs/encode.py", pixels, latents, "--autoencoder", "diffusers:vae")
    shutil.rmtree(checkout / "photos")
    shutil.rmtree(checkout / "vae")
    of_latents = ("folder", "--data", latents, "--storage", runs, *FLAGS)
    train = ("jobs/train.py", *of_latents, "--total-images", 256)
    submit(*train, "--name", "undisturbed")
    submit(*train, "--name", "killed", options=("--no-wait", "--submission-id", "killed"))
    run = storage.resolve(f"{runs}/killed")
    wait_for(lambda: run_folder.checkpoints(run))
    (driver,) = (p for p in members(ray_head.process.pid, "python") if "jobs/train.py" in p.cmdline())
    driver.kill()
    client = JobSubmissionClient(ray_head.dashboard)
    wait_for(lambda: client.get_job_status("killed").is_terminal())
    assert client.get_job_status("killed") == "FAILED"
    submit(*train, "--name", "killed")
    local.assert_same(tensors_of(f"{runs}/killed"), tensors_of(f"{runs}/undisturbed"))

    judges = ("--num-images", 20, "--features", "pixels")
    trials = "--num-trials 4 --num-rungs 1 --finalists 0 --searcher grid --max-concurrent 1".split()
    space = ("--space", "schedule.kind=cosine|linear", "optim.lr=1e-3|4e-3", "--total-images", 128)
    found = submit("tune/search.py", *of_latents, "--name", "search", *trials, *judges, *space)
    assert "searched    4 trials" in found and found.count(" finished") >= 4, found
    drawn = f"{s3_bucket}/drawn"
    submit("jobs/sample.py", f"{runs}/killed", "--num-images", 2, "--label", "dark", "--out", drawn)
    file = storage.resolve(drawn).child("images").child("000001.png")
    with Image.open(io.BytesIO(file.read())) as image:
        assert image.size == (SIZE, SIZE)
    for name in ("undisturbed", "killed"):
        assert "KID-pixels" in submit("jobs/evaluate.py", f"{runs}/{name}", *judges, "--num-sample-steps", 2)
    verdicts = submit("jobs/compare.py", f"{runs}/undisturbed", f"{runs}/killed")
    assert "KID-pixels: " in verdicts and "bits/dim-latents-" in verdicts, verdicts
    submit("jobs/export.py", f"{runs}/killed", tmp_path / "exported", "--label", "dark")
    assert (tmp_path / "exported/sample.py").exists()


def tensors_of(run: str) -> dict[str, Tensor]:
    """The tensors of a run's newest checkpoint."""
    with names.local_checkpoint(run) as folder:
        return local.stored(folder)


def test_photographs_to_latents_in_one_command(place: Path) -> None:
    words = ("folder", "photos", "--size", str(SIZE), "--autoencoder", "diffusers:vae", *FLAGS)
    first = done("train", *words, "--total-images", "64", cwd=place).stdout
    name = Path(next(line.split()[1] for line in first.splitlines() if line.startswith("run "))).name
    assert name.startswith("folder-photos-")
    again = done("train", *words, "--total-images", "64", cwd=place).stdout
    assert f"run {name} is finished" in again
    shown = done("train", *words, "--total-images", "64", "--dry-run", cwd=place).stdout
    assert f"run.name = {name}" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("folder photos --size 128", "--autoencoder"),
        ("folder photos --size 17 --autoencoder diffusers:vae", "no multiple"),
        ("folder photos --autoencoder diffusers:gone", "NAME@REVISION"),
        ("digits --data latents --model.num-classes 2", "set --model.image-size 8 --model.channels 4"),
        ("folder --data latents --data.horizontal-flip", "mirror"),
        ("folder --data latents --data.augment 0.1", "augment"),
        ("digits --net medium", "folder"),
    ],
)
def test_what_does_not_fit_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, user_error: Callable[..., str], flags: str, message: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("RAY_ADDRESS")  # what is refused is refused before Ray starts
    assert message in user_error("train", *flags.split(), "--name", "refused")
    assert not (place / "runs/refused").exists()
