"""External files are read correctly or rejected with one line, and cannot run code, write files or fill memory.

Details of each kind of file are tested beside its reader (tests/data/test_shards.py, tests/data/test_image_folder.py,
tests/checkpoints/test_checkpoint.py, tests/test_config.py, tests/tracking/test_metrics_buffer.py); here they are
altered at random, and claim too much memory. For as long as wanted:

    ALTERED_FILES=100000 .venv/bin/python -m pytest tests/test_hostile_files.py -k altered --timeout 0 \
        --hypothesis-profile default
"""

import io
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.forged import forge
from support.hostile import CPU, SHARD, TARGETS, Target, png_claiming, write_checkpoint

from ddpm import cli, presets
from ddpm.checkpoints import checkpoint, runs
from ddpm.config_io import override, to_json
from ddpm.data.huggingface import HuggingFace
from ddpm.data.idx import read_idx
from ddpm.data.image_folder import Folder, store
from ddpm.data.manifest import (
    MAX_ROW_GROUP_IMAGES,
    MAX_SIDE,
    Manifest,
    Shard,
    make_manifest,
    manifest_from_json,
    read_manifest,
)
from ddpm.data.row_group import CorruptData, content_sha256, decode
from ddpm.data.shards import read_row_group
from ddpm.evaluation import compared_run
from ddpm.search.event_log import EventLog
from ddpm.storage.driver_lock import DriverLock
from ddpm.storage.locations import resolve
from ddpm.utils import files
from ddpm.utils.errors import UserError

ALTERED = settings(
    deadline=None,
    max_examples=int(os.environ.get("ALTERED_FILES", "100")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
STRANGE = [None, True, -1, 0, 1.5, 10**30, "", "../../x", [], {}, [[]], "\x00", "é" * 100]


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    target = TARGETS[request.param](tmp_path_factory.mktemp("target"))
    for seed in target.seeds:
        target.consume(seed)
    return target


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """A test may take at most 4 GiB more."""
    _, most = limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), most))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@ALTERED
@given(data=st.data())
@pytest.mark.usefixtures("limited_memory")
def test_altered_bytes_are_accepted_or_rejected(target: Target, data: st.DataObject) -> None:
    """Bytes are replaced, removed, repeated or inserted; any error other than our own is a failure."""
    altered = bytearray(data.draw(st.sampled_from(target.seeds)))
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of them in the head, which decides how much memory a reader allocates.
        start = data.draw(st.integers(0, min(512, len(altered))) | st.integers(0, len(altered)))
        stop = data.draw(st.integers(start, min(len(altered), start + 64)))
        size = stop - start
        again = st.sampled_from([bytes(altered[start:stop]) * 3, b"\xff" * size, bytes(size)])
        altered[start:stop] = data.draw(st.binary(max_size=8) | again)
    target.read(bytes(altered))


@ALTERED
@given(data=st.data())
@pytest.mark.usefixtures("limited_memory")
def test_altered_json_is_accepted_or_rejected(target: Target, data: st.DataObject) -> None:
    """One value of a valid file is replaced by another."""
    if not target.is_json:
        return
    value = json.loads(target.seeds[0])
    at, key = value, data.draw(st.sampled_from(list(value)))
    while isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
    at[key] = data.draw(st.sampled_from(STRANGE))
    target.read(json.dumps(value).encode())


def manifest_of(
    shard: Shard, height: int = 16, width: int = 16, channels: int = 1, encoding: Any = "raw"
) -> Manifest:
    return make_manifest("test", (height, width, channels), encoding, [], {"train": [shard]}, "")


def shard_of(rows: int, num_bytes: int, path: str = SHARD, sha256: str = "0" * 64) -> Shard:
    return Shard(path, rows, (rows,), num_bytes, "0" * 64, (sha256,))


@ALTERED
@given(path=st.text(max_size=30) | st.from_regex(r"(\.\./|/|train/|\\)*[a-z0-9.]*\.parquet", fullmatch=True))
def test_the_path_of_a_shard_stays_in_its_folder(path: str) -> None:
    text = json.dumps(manifest_of(shard_of(1, 1, path)), default=vars)
    if re.fullmatch(r"train/[0-9]{5,9}\.parquet", path):
        assert manifest_from_json(text, "here").splits["train"].shards[0].path == path
    else:
        with pytest.raises(UserError, match="shard path"):
            manifest_from_json(text, "here")


@ALTERED
@given(st.integers(1, MAX_ROW_GROUP_IMAGES), st.integers(1, MAX_SIDE), st.integers(1, MAX_SIDE))
def test_a_too_large_row_group_is_rejected(rows: int, height: int, width: int) -> None:
    text = json.dumps(manifest_of(shard_of(rows, 10**12), height, width, 3, "encoded"), default=vars)
    if rows * height * width * 3 <= 1 << 31:
        assert manifest_from_json(text, "here").height == height
    else:
        with pytest.raises(UserError, match=r"^here: a row group holds .*, which take more than 2 GiB"):
            manifest_from_json(text, "here")


ZEROS = pa.FixedSizeBinaryArray.from_buffers(pa.binary(256), 1 << 16, [None, pa.py_buffer(bytes(1 << 24))])
REPEATED = pa.DictionaryArray.from_arrays(pa.array([0] * (1 << 16), pa.int32()), pa.array([bytes(1 << 18)]))
FOUR = pa.array([bytes(256)] * 4, pa.binary(256))
UNPACKS = r"it unpacks to more than the \d+ bytes of the whole shard"
BOMBS: list[Any] = [
    ({"image": pa.chunked_array([ZEROS] * 16)}, {"use_dictionary": False}, None, UNPACKS),
    (
        {"image": pa.chunked_array([ZEROS] * 16)},
        {},
        10**11,
        r"the shard has \d+ bytes; the manifest says 1000",
    ),
    ({"image": REPEATED}, {"compression": "none", "store_schema": False}, None, UNPACKS),
]
"""Columns, how they are written, bytes of the shard in the manifest, and the error. The last unpacks to 17 GB."""


@pytest.mark.parametrize(("columns", "options", "num_bytes", "message"), BOMBS)
def test_a_decompression_bomb_is_rejected_before_it_is_unpacked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    columns: Any,
    options: Any,
    num_bytes: int | None,
    message: str,
) -> None:
    file = tmp_path / SHARD
    file.parent.mkdir()
    pq.write_table(pa.table(columns), file, **{"compression": "zstd", **options})
    rows, size = pq.read_metadata(file).num_rows, file.stat().st_size
    assert size < 1 << 20
    encoding = "encoded" if columns["image"] is REPEATED else "raw"
    manifest = manifest_of(shard_of(rows, num_bytes or size), encoding=encoding)
    monkeypatch.setattr("ddpm.data.shards.UNPACKED_BYTES", 1 << 22)
    peak = pa.default_memory_pool().max_memory()
    with pytest.raises(CorruptData, match=message):
        read_row_group(resolve(str(tmp_path)), manifest, "train", 0)
    assert pa.default_memory_pool().max_memory() - peak < 1 << 24


def test_columns_that_are_not_ours_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / SHARD
    file.parent.mkdir()
    wide = pa.DictionaryArray.from_arrays(pa.array([0] * 4, pa.int32()), pa.array([bytes(1 << 24)]))
    table = pa.table({"image": FOUR, "more": wide})
    pq.write_table(table, file, compression="none", use_dictionary=["more"], write_statistics=False)
    manifest = manifest_of(shard_of(4, file.stat().st_size, sha256=content_sha256(FOUR, None)))
    pool = pa.default_memory_pool()
    peak = pool.max_memory()
    assert read_row_group(resolve(str(tmp_path)), manifest, "train", 0)[0].shape == (4, 16, 16, 1)
    assert pool.max_memory() == peak


def config_flag(file: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", "--config", str(file)])
    return cli.starting_point(presets.DIGITS)


READ_WHOLE: dict[str, Any] = {
    "checksums.json": lambda file, _: checkpoint.read_checksums(file.parent),
    "config.json": lambda file, _: checkpoint.read_config(file.parent),
    "state.json": lambda file, _: checkpoint.read_state(file.parent),
    "run.json": lambda file, _: runs.existing_run(str(file.parent)),
    "manifest.json": lambda file, _: read_manifest(resolve(str(file.parent))),
    "best.json": config_flag,
    "search.json": lambda file, _: EventLog.existing(resolve(str(file.parent))),
    "driver.json": lambda file, _: DriverLock(resolve(str(file.parent)), "run", "name", print).__enter__(),
    "progress.json": lambda file, _: resolve(str(file)).read(),
    "evaluations.json": lambda file, _: compared_run._report_in(resolve(str(file)), str(file)),
    "list_eval_partition.txt": lambda file, _: files.read_whole(file),
    "train-images-idx3-ubyte": lambda file, _: read_idx(file),
}
SPECIAL: dict[str, Any] = {
    "a link to a device": (lambda file: file.symlink_to("/dev/zero"), "is not a regular file"),
    "a FIFO": (os.mkfifo, "is not a regular file"),
    "a folder": (Path.mkdir, "is not a regular file"),
    "a huge file": (
        lambda file: (file.touch(), os.truncate(file, 1 << 40)),
        r"is larger than [\d,]+ bytes, the most",
    ),
}


@pytest.mark.parametrize("name", READ_WHOLE)
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_file_that_is_read_whole_is_regular_and_not_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    make, message = SPECIAL[kind]
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}.*{message}") as caught:
        READ_WHOLE[name](tmp_path / name, monkeypatch)
    assert "\n" not in str(caught.value)


def test_an_object_that_is_read_whole_is_not_too_large(s3_bucket: str) -> None:
    file = resolve(f"{s3_bucket}/run.json")
    file.write(bytes(1000))
    assert file.read(1000) == bytes(1000)
    with pytest.raises(
        UserError, match=r"^s3://.*run\.json is larger than 999 bytes, the most that is read$"
    ):
        file.read(999)


OTHER_NET = "ema.safetensors is damaged or of another architecture"
TOO_LARGE: list[tuple[dict[str, Any], str]] = [
    ({"model.base_width": 400_000}, OTHER_NET),
    ({"model.net": "dit"}, OTHER_NET),
    ({"model.net": "dit", "model.width": 200_000}, OTHER_NET),
    ({"model.num_classes": 10**6}, OTHER_NET),
    ({"model.net": "dit", "model.mlp_ratio": 10**9}, "model.mlp_ratio is 1000000000; it must be"),
    ({"model.base_width": 10**9}, "model.base_width is 1000000000; it must be at most"),
    ({"model.num_classes": 10**30}, "model.num_classes is 10+; it must be"),
    ({"model.blocks_per_resolution": 10**9}, "model.blocks_per_resolution is 1000000000"),
    ({"model.channels": 10**30}, "model.channels is 10+; it must be"),
    ({"schedule.kind": "linear", "schedule.beta_end": 7.0}, "schedule.beta_end is 7.0; it must be"),
]


@pytest.mark.parametrize(("values", "message"), TOO_LARGE, ids=str)
def test_a_config_of_a_too_large_net_is_rejected(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "checkpoint"
    config = write_checkpoint(folder)
    tree = json.loads(to_json(override(config, {"model.net": values.get("model.net", "unet")})))
    for key, value in values.items():
        group, name = key.split(".")
        tree[group][name] = value
    forge(folder, "config.json", json.dumps(tree).encode())
    with pytest.raises(UserError, match=message if message == OTHER_NET else f"config.json: {message}"):
        checkpoint.load_net(folder, CPU)


def test_pillow_starts_no_other_program_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow passes PostScript to Ghostscript, whatever the file name."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *words, **_: started.append(words))
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_: started.append(words))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/tmp/x) (w) file\n%%EOF\n"
    assert Image.open(io.BytesIO(script)).format == "EPS"
    with pytest.raises(UserError, match="cannot read the image cat"):
        store([(script, "cat.png", None)], 8, 3, "encoded")
    assert started == []


@pytest.mark.parametrize("side", [8193, 13_000, 40_000])  # Pillow is silent, warns, or raises
def test_an_image_with_too_many_pixels_is_rejected_by_its_header(tmp_path: Path, side: int) -> None:
    claiming = png_claiming(side)
    too_many_pixels = r"it has more than 67,108,864 pixels, the most that are decoded"
    with pytest.raises(UserError, match=f"^cannot read the image it: {too_many_pixels}"):
        store([(claiming, "it", None)], 8, 1, "raw")
    for expected in (8, side):  # the manifest's
        with pytest.raises(ValueError, match=f"^the image cannot be decoded: {too_many_pixels}"):
            decode(claiming, expected, expected, 1)
    (tmp_path / "cats").mkdir()
    for i in range(2):
        (tmp_path / "cats" / f"{i}.png").write_bytes(claiming)
    with pytest.raises(UserError, match=rf"\d\.png: {too_many_pixels}"):
        Folder(tmp_path / "cats", size=8).read("train", 0, 1)
    pq.write_table(pa.table({"image": [claiming, claiming]}), tmp_path / "all.parquet")
    with pytest.raises(UserError, match=rf"all\.parquet, row group 0, row \d: {too_many_pixels}"):
        HuggingFace(tmp_path / "all.parquet", size=8, label_column=None).read("train", 0, 1)


def test_the_largest_image_is_accepted() -> None:
    with pytest.raises(ValueError, match=r"cannot be decoded: (?!it has more)"):  # its pixels are missing
        decode(png_claiming(8192), 8192, 8192, 1)
