"""Files from outside: a truncated, an oversized and a pickled one of each kind is an error, and nothing is executed.

What a wrong byte does is tested beside each reader.
"""

import io
import json
import os
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import searches
from support.trained import write_trained

from ddpm.config.json import from_json, to_json
from ddpm.config.tree import Config
from ddpm.data.manifest import make_manifest, read_manifest
from ddpm.data.row_group import decode
from ddpm.data.shards import read_row_group, write_shard
from ddpm.data.sources.conversion import ImageFile, store
from ddpm.data.sources.huggingface import HuggingFace
from ddpm.data.sources.image_folder import Folder
from ddpm.data.sources.torchvision import FashionMnist
from ddpm.evaluation import compared_run, rung
from ddpm.evaluation.rung import Evaluation
from ddpm.runs import checkpoint, curves, generations, run_folder
from ddpm.runs.curves import CurveRow
from ddpm.runs.evaluations import Report
from ddpm.runs.storage import resolve
from ddpm.search.trials import read_search, read_trial
from ddpm.training.state import State
from ddpm.utils import files
from ddpm.utils.errors import UserError

SHARD = "train/00000.parquet"
CURVES, CURVES_BYTES = curves.part(0, [CurveRow("loss", 1, 1.0, 1)], 1)
RUNG = Evaluation(64, (2.0, 3.0), 0.5, 0.5)
IMAGES = np.zeros((6, 8, 8, 1), np.uint8)
PICKLE = b"cposix\nsystem\n(S'touch executed'\ntR."
"""When it is unpickled, it makes a file in the working folder."""


def write_all(folder: Path, tiny: Config) -> None:
    """A valid file of each kind."""
    write_trained(folder, tiny)
    shard = write_shard(resolve(str(folder)), SHARD, IMAGES, None, rows_per_row_group=6)
    manifest = make_manifest("test", (8, 8, 1), "raw", [], {"train": [shard]}, "")
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))
    (folder / "run.json").write_text('{"name": "a", "run_key": "a", "created_ms": 0}')
    (folder / generations.FILE).write_text(json.dumps(asdict(generations.Generations())))
    (folder / "status.json").write_bytes(
        run_folder.status_json(run_folder.Status(run_folder.RunStatus.RUNNING, 1, 0, 1.0))
    )
    (folder / "flag.json").write_text(to_json(tiny))
    searches.begin(resolve(str(folder))).begin("trial", {})
    resolve(str(folder)).child(rung.file_name(RUNG.images_seen)).write(RUNG.to_json())
    (folder / "report.json").write_text(Report({}, ()).to_json())
    resolve(str(folder)).child(CURVES).write(CURVES_BYTES)
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 0x803, 2, 28, 28) + bytes(2 * 28 * 28)
        )
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 2) + b"\1\2")


def read_shard(folder: Path) -> object:
    return read_row_group(resolve(str(folder)), read_manifest(resolve(str(folder))), "train", 0)


def resume(folder: Path) -> None:
    config = checkpoint.read_config(folder)
    State.create(config, torch.device("cpu")).restore(folder, config)


READERS: dict[str, Callable[[Path], object]] = {
    "ema.safetensors": checkpoint.load_net,
    "net.safetensors": resume,
    "optimizer.safetensors": resume,
    "state.json": checkpoint.read_state,
    "config.json": checkpoint.read_config,
    "checksums.json": checkpoint.read_checksums,
    "flag.json": lambda folder: from_json(files.read_whole(folder / "flag.json"), "flag.json"),
    "manifest.json": lambda folder: read_manifest(resolve(str(folder))),
    SHARD: read_shard,
    "run.json": lambda folder: run_folder.existing_run(str(folder)),
    generations.FILE: lambda folder: generations.read(resolve(str(folder))),
    "status.json": lambda folder: run_folder.read_status(resolve(str(folder))),
    "search.json": lambda folder: read_search(resolve(str(folder))),
    "trial/trial.json": lambda folder: read_trial(resolve(str(folder / "trial"))),
    rung.file_name(RUNG.images_seen): lambda folder: rung.read(resolve(str(folder)), RUNG.images_seen),
    "report.json": lambda folder: compared_run._report_in(
        resolve(str(folder / "report.json")), "report.json"
    ),
    CURVES: lambda folder: curves.read(resolve(str(folder))),
    "train-labels-idx1-ubyte": lambda folder: FashionMnist(path=folder).splits,
    "t10k-images-idx3-ubyte": lambda folder: FashionMnist(path=folder).splits,
}


@pytest.mark.parametrize("name", READERS)
def test_a_truncated_an_oversized_and_a_pickled_file_are_errors(
    name: str, tiny: Config, tmp_path: Path
) -> None:
    write_all(tmp_path, tiny)
    READERS[name](tmp_path)
    file = tmp_path / name
    whole = file.read_bytes().rstrip()
    rng = random.Random(0)
    cuts = [whole[: rng.randrange(len(whole))] for _ in range(4)]
    for damaged in (b"", *cuts, PICKLE):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=name) as caught:
            READERS[name](tmp_path)
        assert "\n" not in str(caught.value)
    os.truncate(file, 1 << 40)
    if "safetensors" not in name:  # hashing a terabyte takes an hour
        with pytest.raises(UserError, match=rf"{name}( is larger than|.*the shard has)"):
            READERS[name](tmp_path)
    assert not (tmp_path / "executed").exists()


def test_an_object_that_is_read_whole_is_not_too_large(s3_bucket: str) -> None:
    file = resolve(f"{s3_bucket}/run.json")
    file.write(bytes(1000))
    assert file.read(1000) == bytes(1000)
    with pytest.raises(UserError, match=r"^s3://.*run\.json is larger than 999 bytes"):
        file.read(999)


def test_pillow_starts_no_other_program_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow passes PostScript to Ghostscript, whatever the file name."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *words, **_: started.append(words))
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_: started.append(words))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/tmp/x) (w) file\n%%EOF\n"
    assert Image.open(io.BytesIO(script)).format == "EPS"
    with pytest.raises(UserError, match=r"cat\.png"):
        store([ImageFile(script, "cat.png", None)], 8, 3, "encoded")
    assert started == []


def png_of(side: int) -> bytes:
    """A PNG of 8x8 whose header says side x side."""
    file = io.BytesIO()
    Image.fromarray(IMAGES[0, :, :, 0]).save(file, "PNG")
    data = file.getvalue()
    header = data[12:16] + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("side", [8193, 13_000, 40_000])  # Pillow is silent, warns, or raises
def test_an_image_with_too_many_pixels_is_rejected_by_its_header(tmp_path: Path, side: int) -> None:
    large = png_of(side)
    message = "more than 67,108,864 pixels"
    with pytest.raises(ValueError, match=message):
        decode(large, side, side, 1)
    (tmp_path / "cats").mkdir()
    for i in range(2):
        (tmp_path / "cats" / f"{i}.png").write_bytes(large)
    with pytest.raises(UserError, match=rf"\d\.png: .*{message}"):
        Folder(tmp_path / "cats", size=8).read("train", 0, 1)
    pq.write_table(pa.table({"image": [large, large]}), tmp_path / "all.parquet")
    with pytest.raises(UserError, match=rf"all\.parquet, train, row \d: .*{message}"):
        HuggingFace(tmp_path / "all.parquet", size=8, label_column=None).read("train", 0, 1)
