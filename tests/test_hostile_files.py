"""External files are read correctly or rejected with one line, and cannot run code, write files or fill memory.

Details of each kind of file are tested beside its reader (tests/data/test_shards.py, tests/data/test_image_folder.py,
tests/checkpoints/test_checkpoint.py, tests/test_config.py, tests/tracking/test_metrics_buffer.py); here they are
altered at random, and claim too much memory. tests/fuzz.py does the same for any length of time.
"""

import io
import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzz import TARGETS, Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.forged import forge
from support.processes import REPO

from ddpm.checkpoints import checkpoint
from ddpm.config import Config, override, to_json
from ddpm.data.corrupt import CorruptData
from ddpm.data.huggingface import HuggingFace
from ddpm.data.image_folder import Folder, store
from ddpm.data.manifest import MAX_COUNT, MAX_SIDE, Shard, make_manifest, manifest_from_json
from ddpm.data.row_group import decode
from ddpm.data.shards import read_row_group
from ddpm.presets import DIGITS
from ddpm.storage.locations import resolve
from ddpm.training.state import State
from ddpm.utils.errors import UserError

CPU = torch.device("cpu")
ALTERED = settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.__name__)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return request.param(tmp_path_factory.mktemp("target"))


@ALTERED
@given(data=st.data())
def test_altered_bytes_are_accepted_or_rejected(target: Target, data: st.DataObject) -> None:
    """Bytes are replaced, removed or inserted; any error other than our own is a failure."""
    altered = bytearray(data.draw(st.sampled_from(target.seeds)))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(altered)))
        stop = data.draw(st.integers(start, min(len(altered), start + 8)))
        altered[start:stop] = data.draw(st.binary(max_size=8))
    target.read(bytes(altered))


@ALTERED
@given(data=st.data())
def test_altered_json_is_accepted_or_rejected(target: Target, data: st.DataObject) -> None:
    """One value of a valid file is replaced by another."""
    if not target.is_json:
        return
    value = json.loads(target.seeds[0])
    strange = st.sampled_from(
        [None, True, -1, 0, 1.5, 10**30, "", "../../x", [], {}, [[]], "\x00", "é" * 100]
    )
    at, key = value, data.draw(st.sampled_from(list(value)))
    while isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
    at[key] = data.draw(strange)
    target.read(json.dumps(value).encode())


@ALTERED
@given(path=st.text(max_size=30) | st.from_regex(r"(\.\./|/|train/|\\)*[a-z0-9.]*\.parquet", fullmatch=True))
def test_the_path_of_a_shard_stays_in_its_folder(path: str) -> None:
    shard = Shard(path, 1, (1,), 1, "0" * 64, ("0" * 64,))
    manifest = make_manifest("test", 1, 1, 1, "raw", [], {"train": [shard]}, "")
    text = json.dumps(manifest, default=vars)
    if re.fullmatch(r"train/[0-9]{5,9}\.parquet", path):
        assert manifest_from_json(text, "here").splits["train"].shards[0].path == path
    else:
        with pytest.raises(UserError, match="shard path"):
            manifest_from_json(text, "here")


@ALTERED
@given(
    rows=st.integers(1, MAX_COUNT),
    height=st.integers(1, MAX_SIDE),
    width=st.integers(1, MAX_SIDE),
)
def test_a_too_large_row_group_is_rejected(rows: int, height: int, width: int) -> None:
    shard = Shard("train/00000.parquet", rows, (rows,), 1, "0" * 64, ("0" * 64,))
    text = json.dumps(
        make_manifest("test", height, width, 3, "raw", [], {"train": [shard]}, ""), default=vars
    )
    if rows * height * width * 3 <= 1 << 31:
        assert manifest_from_json(text, "here").height == height
    else:
        with pytest.raises(UserError, match=r"^here: a row group holds .*, which take more than 2 GiB"):
            manifest_from_json(text, "here")


def test_a_decompression_bomb_is_rejected_before_it_is_unpacked(tmp_path: Path) -> None:
    rows, side = 1 << 20, 16
    zeros = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(side * side), 1 << 16, [None, pa.py_buffer(bytes(1 << 24))]
    )
    (tmp_path / "train").mkdir()
    file = tmp_path / "train/00000.parquet"
    pq.write_table(
        pa.table({"image": pa.chunked_array([zeros] * (rows >> 16))}),
        file,
        compression="zstd",
        use_dictionary=False,
    )
    assert file.stat().st_size < 1 << 20
    shard = Shard("train/00000.parquet", rows, (rows,), file.stat().st_size, "0" * 64, ("0" * 64,))
    manifest = make_manifest("test", side, side, 1, "raw", [], {"train": [shard]}, "")
    before = pa.total_allocated_bytes()
    with pytest.raises(CorruptData, match=r"it unpacks to 268\d{6} bytes; the whole shard has"):
        read_row_group(resolve(str(tmp_path)), manifest, "train", 0)
    assert pa.total_allocated_bytes() - before < 1 << 24


TOO_LARGE = {
    "a wide net": ({"model.base_width": 400_000}, "ema.safetensors is damaged or of another architecture"),
    "another net": ({"model.net": "dit"}, "ema.safetensors is damaged or of another architecture"),
    "a wide Transformer": (
        {"model.net": "dit", "model.width": 200_000},
        "ema.safetensors is damaged or of another architecture",
    ),
    "a Transformer too wide": (
        {"model.net": "dit", "model.mlp_ratio": 10**9},
        "config.json: model: mlp_ratio is 1000000000; it must be",
    ),
    "a net too wide": (
        {"model.base_width": 10**9},
        "config.json: model: base_width is 1000000000; it must be at most",
    ),
    "a net of many classes": (
        {"model.num_classes": 10**6},
        "ema.safetensors is damaged or of another architecture",
    ),
    "a net of too many": (
        {"model.num_classes": 10**30},
        "config.json: model: num_classes is 10+; it must be",
    ),
    "a deep net": (
        {"model.blocks_per_resolution": 10**9},
        "config.json: model: blocks_per_resolution is 1000000000",
    ),
    "a schedule of nothing": (
        {"schedule.kind": "linear", "schedule.beta_end": 7.0},
        r"config.json: schedule: beta_end is 7.0; it must be",
    ),
    "a net of many channels": ({"model.channels": 10**30}, "config.json: model: channels is 10+; it must be"),
}


@pytest.mark.parametrize(("values", "message"), TOO_LARGE.values(), ids=list(TOO_LARGE))
def test_a_config_of_a_too_large_net_is_rejected(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    config = override(DIGITS, {"model.base_width": 8, "model.norm_groups": 4})
    folder = tmp_path / "c"
    checkpoint.write(State.create(config, CPU).snapshot(config, {}), folder)
    forge(folder, "config.json", to_json(override(config, values)).encode())
    with pytest.raises(UserError, match=message):
        checkpoint.load_net(folder, CPU)


def test_a_too_long_schedule_is_rejected() -> None:
    from ddpm.diffusion import schedules

    config = override(Config(), {"schedule.num_timesteps": 10**12})
    with pytest.raises(
        ValueError, match=r"num_timesteps is 1000000000000; it must be in 1, 2, \.\.\. 1000000"
    ):
        schedules.build(config.schedule)


def test_pillow_starts_no_other_program_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow passes PostScript to Ghostscript, whatever the file name."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *words, **_: started.append(words))
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_: started.append(words))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/tmp/x) (w) file\n%%EOF\n"
    assert Image.open(io.BytesIO(script)).format == "EPS"
    with pytest.raises(UserError, match="cannot read the image cat"):
        store([(script, "cat.png")], 8, 3, "encoded")
    assert started == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_supported_image_formats_are_accepted(kind: str) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(file, kind)
    assert len(store([(file.getvalue(), "it")], 8, 1, "raw")) == 1


def png_claiming(side: int) -> bytes:
    """A PNG of 8x8 whose header says side x side."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "PNG")
    data = file.getvalue()
    header = data[12:16] + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("side", [8193, 13_000, 40_000])  # Pillow is silent, warns, or raises
def test_an_image_with_too_many_pixels_is_rejected_by_its_header(tmp_path: Path, side: int) -> None:
    claiming = png_claiming(side)
    too_many_pixels = r"it has more than 67,108,864 pixels, the most that are decoded"
    with pytest.raises(UserError, match=f"^cannot read the image it: {too_many_pixels}"):
        store([(claiming, "it")], 8, 1, "raw")
    with pytest.raises(ValueError, match=f"^the image cannot be decoded: {too_many_pixels}"):
        decode(claiming, 8, 8, 1)
    with pytest.raises(ValueError, match=f"^the image cannot be decoded: {too_many_pixels}"):
        decode(claiming, side, side, 1)  # although the manifest has this size too
    (tmp_path / "cats").mkdir()
    for i in range(2):
        (tmp_path / "cats" / f"{i}.png").write_bytes(claiming)
    with pytest.raises(UserError, match=rf"0\.png: {too_many_pixels}.*\(and 1 more: .*1\.png\)"):
        Folder(tmp_path / "cats", size=8).check()
    pq.write_table(pa.table({"image": [claiming, claiming]}), tmp_path / "all.parquet")
    with pytest.raises(UserError, match=rf"all\.parquet, row group 0, row \d: {too_many_pixels}"):
        HuggingFace(tmp_path / "all.parquet", size=8, label_column=None).read("train", 0, 1)


def test_the_largest_image_is_accepted() -> None:
    with pytest.raises(
        ValueError, match=r"cannot be decoded: (?!it has more)"
    ):  # because its pixels are missing
        decode(png_claiming(8192), 8192, 8192, 1)


def test_the_fuzzer_runs_and_reports(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, REPO / "tests/fuzz.py", "--seconds", "0.2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{REPO}:{REPO / 'tests'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert all(target.__name__ in done.stdout for target in TARGETS)
