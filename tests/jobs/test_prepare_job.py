"""python jobs/prepare.py from the command line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from PIL import Image
from support import examples, processes

from ddpm.cli import prepare
from ddpm.cluster import job_folder
from ddpm.data import prepare as data_prepare
from ddpm.data.manifest import MANIFEST, read_manifest
from ddpm.runs import storage
from ddpm.utils.errors import UserError


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_preparing_digits_twice(run_job: Callable[..., Any], tmp_path: Path) -> None:
    done = run_job("prepare", "digits", "data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(storage.resolve(str(tmp_path / "data")))
    for shown in (f"{tmp_path}/data", "1,500", "297", manifest.fingerprint, f"{tmp_path}/data/preview.png"):
        assert shown in done.stdout
    before = files_of(tmp_path)
    again = run_job("prepare", "digits", "data", cwd=tmp_path)
    assert again.returncode == 0 and manifest.fingerprint in again.stdout
    assert files_of(tmp_path) == before


def test_an_image_folder_with_an_unreadable_image_becomes_a_data_set_in_a_bucket(
    tmp_path: Path, run_job: Callable[..., Any], user_error: Callable[..., str], s3_bucket: str
) -> None:
    for i in range(20):
        (tmp_path / f"in/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30), (i, 0, 0)).save(tmp_path / f"in/{'ab'[i % 2]}/{i}.jpg")
    (tmp_path / "in/a/0.jpg").write_bytes(b"broken")
    (tmp_path / "in/a/b\nerror: forged.txt").touch()
    location = storage.resolve(f"{s3_bucket}/pets")
    words = ("prepare", "folder", location.uri, "--path", f"{tmp_path}/in", "--size", "16")
    assert user_error(*words).startswith("1 of 20 images cannot be read (")
    assert not location.child(MANIFEST).exists()
    done = run_job(*words, "--skip-unreadable")
    assert done.returncode == 0, done.stderr
    listed = f"left out    1 image that cannot be read, listed in {location.uri}/unreadable.txt"
    assert {"skipped     1 other file, such as a/b\\nerror: forged.txt", listed} <= {
        *done.stdout.splitlines()
    }
    manifest = read_manifest(location)
    assert manifest.splits["train"].num_rows == 15 and manifest.class_names == ("a", "b")
    assert location.child("preview.png").exists() and f"{location.uri}/preview.png" in done.stdout


def test_a_cluster_is_not_asked_for_files_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(data_prepare, "LARGE_ENCODED", 0)
    monkeypatch.setattr(job_folder, "set_home", lambda: None)
    (tmp_path / "in").mkdir()
    for i in range(2):
        Image.new("L", (16, 16)).save(tmp_path / f"in/{i}.png")
    monkeypatch.setattr(sys, "argv", "prepare folder out --path in --size 16".split())
    prepare.main()
    assert read_manifest(storage.resolve("out")).splits["train"].num_rows == 1
    monkeypatch.setattr(sys, "argv", "prepare folder in/out --path in --size 16".split())
    with pytest.raises(UserError, match="in/out is in in"):
        prepare.main()


def test_a_bucket_without_list_permission_is_a_one_line_error(
    user_error: Callable[..., str], s3_bucket: str
) -> None:
    bucket = s3_bucket.removeprefix("s3://")
    client = boto3.client("s3")
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
    refused = user_error("prepare", "digits", f"{s3_bucket}/data/digits")
    client.delete_bucket_policy(Bucket=bucket)
    client.close()
    assert refused.startswith(f"cannot look for a data set at {s3_bucket}/data/digits: ")
    assert "ACCESS_DENIED during ListObjectsV2" in refused


@pytest.mark.slow
def test_resuming_after_a_kill_between_shards_gives_the_same_bytes(
    run_job: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["--num-images", "26000", "--size", "16"]
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    env = examples.env("glyphs")
    assert run_job("prepare", "glyphs", whole, *words, env=env).returncode == 0
    with processes.Job("prepare", "glyphs", parts, *words, log=tmp_path / "job.log", env=env) as job:
        job.wait_for((parts / "train/00000.parquet").exists)
    assert not (parts / MANIFEST).exists()
    first = (parts / "train/00000.parquet").stat().st_mtime_ns
    assert run_job("prepare", "glyphs", parts, *words, env=env).returncode == 0
    assert files_of(parts) == files_of(whole)
    assert (parts / "train/00000.parquet").stat().st_mtime_ns == first, "a finished shard was made again"
