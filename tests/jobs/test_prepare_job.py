"""python jobs/prepare.py from the command line."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from PIL import Image
from support import processes

from ddpm.data.manifest import MANIFEST, read_manifest
from ddpm.storage import locations


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_preparing_digits_twice(run_job: Callable[..., Any], tmp_path: Path) -> None:
    done = run_job("prepare", "digits", "data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    location = locations.resolve(str(tmp_path / "data"))
    manifest = read_manifest(location)
    for skipped in (
        str(tmp_path / "data"),
        "1,500",
        "297",
        manifest.fingerprint,
        str(tmp_path / "data/preview.png"),
    ):
        assert skipped in done.stdout
    with Image.open(tmp_path / "data/preview.png") as preview:
        assert preview.size == (402, 402)
    before = files_of(tmp_path)
    again = run_job("prepare", "digits", "data", cwd=tmp_path)
    assert again.returncode == 0 and manifest.fingerprint in again.stdout
    assert files_of(tmp_path) == before


def test_an_image_folder_becomes_a_data_set_in_a_bucket(
    run_job: Callable[..., Any], tmp_path: Path, s3_bucket: str
) -> None:
    for i in range(20):
        for name in ("cat", "dog"):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 16), (i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    uri = f"{s3_bucket}/pets"
    done = run_job("prepare", "folder", uri, "--path", "images", "--size", "16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    location = locations.resolve(uri)
    manifest = read_manifest(location)
    assert manifest.class_names == ("cat", "dog")
    assert {name: split.num_rows for name, split in manifest.splits.items()} == {"train": 38, "test": 2}
    assert location.child("preview.png").exists() and f"{uri}/preview.png" in done.stdout


def test_a_bucket_without_list_permission_is_a_one_line_error(
    run_job: Callable[..., Any], s3_bucket: str
) -> None:
    bucket, client = s3_bucket.removeprefix("s3://"), boto3.client("s3")
    statement = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": ["s3:ListBucket"],
        "Resource": [f"arn:aws:s3:::{bucket}"],
        "Condition": {"StringLike": {"s3:prefix": "*data*"}},
    }
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    client.head_bucket(Bucket=bucket)  # writing is allowed
    done = run_job("prepare", "digits", f"{s3_bucket}/data/digits")
    client.delete_bucket_policy(Bucket=bucket)
    client.close()
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot look for a data set at {s3_bucket}/data/digits: ")
    assert "ACCESS_DENIED during ListObjectsV2" in done.stderr and done.stderr.count("\n") == 1


def test_files_that_are_not_images_are_reported(run_job: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/a.gif").write_bytes(b"GIF89a")
    (tmp_path / "in/b\nerror: forged.txt").write_text("")
    done = run_job("prepare", "folder", "out", "--path", "in", "--size", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    skipped = "skipped     1 .gif (a.gif), 1 .txt (b\\nerror: forged.txt)"
    assert done.stdout.splitlines()[:2] == [f"data set    {tmp_path}/out", skipped]


BAD = {
    "no such source": (["digitz", "data"], "digitz"),
    "no place": (["digits"], "URI"),
    "unknown scheme": (["digits", "gs://b/data"], "unknown scheme"),
    "files missing": (["fashion-mnist", "data", "--path", "none"], "--path"),
    "folder missing": (["folder", "data", "--path", "none", "--size", "16"], "none is not a folder"),
    "nothing downloaded": (["torchvision", "data", "--dataset", "cifar10"], "cifar-10-batches-"),
    "no parquet": (["parquet", "data", "--path", "none", "--size", "16"], "none"),
    "size out of range": (["glyphs", "data", "--size", "0"], "size"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=list(BAD))
def test_user_errors_have_exit_code_2(
    run_job: Callable[..., Any], tmp_path: Path, words: list[str], message: str
) -> None:
    done = run_job("prepare", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if done.stderr.startswith("error:"):  # otherwise tyro's own box about the command line
        assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_other_options_are_rejected(run_job: Callable[..., Any], tmp_path: Path) -> None:
    assert run_job("prepare", "digits", "data", cwd=tmp_path).returncode == 0
    before = files_of(tmp_path)
    done = run_job("prepare", "digits", "data", "--seed", "1", cwd=tmp_path)
    assert done.returncode == 2 and "other options" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert files_of(tmp_path) == before


@pytest.mark.slow
def test_resuming_after_a_kill_between_shards_gives_the_same_bytes(
    run_job: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["--num-images", "40000", "--size", "16"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_job("prepare", "glyphs", whole, *words).returncode == 0
    process = subprocess.Popen([*processes.job_command("prepare"), "glyphs", str(parts), *words])
    try:
        while not (parts / "_prepare/train-00000.parquet.json").exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (parts / MANIFEST).exists()
    first = (parts / "train/00000.parquet").stat().st_mtime_ns
    assert run_job("prepare", "glyphs", parts, *words).returncode == 0
    assert files_of(parts) == files_of(whole)
    assert (parts / "train/00000.parquet").stat().st_mtime_ns == first, "a finished shard was made again"
