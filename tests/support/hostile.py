"""Kinds of external files: valid examples of each, the reader that accepts or rejects any bytes, and its own errors."""

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm.checkpoints import checkpoint
from ddpm.config import Config
from ddpm.config_io import from_json, override, to_json
from ddpm.data.image_folder import store
from ddpm.data.manifest import Manifest, make_manifest, manifest_from_json
from ddpm.data.row_group import CorruptData, decode
from ddpm.data.shards import read_row_group, write_shard
from ddpm.evaluation.scores import Score
from ddpm.presets import DIGITS
from ddpm.search import event_log
from ddpm.search.event_log import EventLog
from ddpm.storage.locations import resolve
from ddpm.tracking import metrics_buffer
from ddpm.tracking.metrics_buffer import DamagedSegment, MetricsBuffer
from ddpm.training.state import State
from ddpm.utils.errors import UserError
from support.forged import forge, write_trained

SIDE, SHARD = 8, "train/00000.parquet"
IMAGES = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), np.uint8)
SMALL = {"model.base_width": 4, "model.norm_groups": 2}
SMALL |= {"model.width_multipliers": [1], "model.attention_resolutions": [8]}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Args:
        seeds: valid files.
        consume: reads a file.
        refusals: the errors by which the reader may reject a file.
        is_json: whether the file is one JSON object.
    """

    seeds: Sequence[bytes]
    consume: Callable[[bytes], object]
    refusals: type[Exception] = UserError
    is_json: bool = False

    def read(self, data: bytes) -> None:
        """Read a file that may be rejected, with a short message."""
        try:
            self.consume(data)
        except self.refusals as error:
            assert len(str(error)) < 2000, str(error)[:200]


def image_file(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(IMAGES[0]).convert(mode).save(file, kind)
    return file.getvalue()


def png_claiming(side: int) -> bytes:
    """A PNG of 8x8 whose header says side x side."""
    data = image_file("PNG", "L")
    header = data[12:16] + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def manifest_of_a_shard(folder: Path) -> Manifest:
    shard = write_shard(resolve(str(folder)), SHARD, IMAGES, None, rows_per_row_group=3)
    return make_manifest("test", (SIDE, SIDE, 3), "raw", [], {"train": [shard]}, "")


def manifest(folder: Path) -> Target:
    seed = json.dumps(asdict(manifest_of_a_shard(folder))).encode()
    return Target([seed], lambda data: manifest_from_json(data, "manifest.json"), is_json=True)


def shard(folder: Path) -> Target:
    """The shard file; its manifest is not altered."""
    manifest = manifest_of_a_shard(folder)

    def consume(data: bytes) -> None:
        (folder / SHARD).write_bytes(data)
        read_row_group(resolve(str(folder)), manifest, "train", 1)

    return Target([(folder / SHARD).read_bytes()], consume, CorruptData)


def config(folder: Path) -> Target:
    def consume(data: bytes) -> None:
        with contextlib.suppress(UnicodeDecodeError):  # raised by read_text, before our own code
            from_json(data.decode())

    return Target([to_json(DIGITS).encode()], consume, is_json=True)


def write_checkpoint(folder: Path) -> Config:
    """Write a checkpoint after one step; returns its config."""
    torch.set_num_threads(1)
    config = override(DIGITS, SMALL)
    write_trained(folder, config, steps=1)
    return config


def of_checkpoint(name: str, resumes: bool = False) -> Callable[[Path], Target]:
    """A file of a checkpoint, to sample or to resume, with a matching checksum, as an attacker would write it."""

    def target(folder: Path) -> Target:
        config = write_checkpoint(folder)

        def consume(data: bytes) -> None:
            forge(folder, name, data)
            if resumes:
                State.create(config, CPU).restore(folder, config)
            else:
                checkpoint.load_net(folder, CPU)

        return Target([(folder / name).read_bytes()], consume, is_json=name.endswith(".json"))

    return target


def encoded_image(folder: Path) -> Target:
    """An image of a data set."""
    seeds = [image_file(kind) for kind in ("PNG", "JPEG", "WEBP")]
    return Target(seeds, lambda data: decode(data, SIDE, SIDE, 3), ValueError)


def picture(folder: Path) -> Target:
    """An image file of a user, to prepare."""
    seeds = [image_file(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")]
    seeds += [image_file("PNG", "P"), image_file("PNG", "LA"), image_file("TIFF", "CMYK")]
    return Target(seeds, lambda data: store([(data, "it", None)], SIDE, 3, "raw"))


def segment(folder: Path) -> Target:
    """A segment of a run's spool."""
    buffer = MetricsBuffer()
    buffer.metrics({"train/loss": 0.5}, 1)
    buffer.image("samples", IMAGES[0], 1)
    buffer.artifact("pictures/strip.txt", b"strip")
    seed = metrics_buffer.pack(buffer.take())
    return Target([seed], lambda data: metrics_buffer.read(data, "segment"), DamagedSegment)


def search_log(folder: Path) -> Target:
    """The event log of a search."""
    log = EventLog(resolve(str(folder)), {"seed": 0}, 0.0)
    log.add(event_log.Begun(0, {"optim.lr": 0.1}))
    log.add(event_log.Evaluated(0, event_log.Rung(64, 2.5, 0.1, 0.5, 0.4, 9.0), True))
    log.add(event_log.Ended(0, "stopped", "", wall_s=20.0, training_s=9.0))
    log.add(event_log.Scored(0, Score("KID-pixels", 0.5, 0.1, 100)))

    def consume(data: bytes) -> None:
        (folder / event_log.FILE).write_bytes(data)
        EventLog(resolve(str(folder)), {"seed": 0}, 0.0)

    return Target([(folder / event_log.FILE).read_bytes()], consume, is_json=True)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "manifest": manifest,
    "shard": shard,
    "config": config,
    "weights": of_checkpoint("ema.safetensors"),
    "config of a checkpoint": of_checkpoint("config.json"),
    "state": of_checkpoint("state.json", resumes=True),
    "optimizer": of_checkpoint("optimizer.safetensors", resumes=True),
    "encoded image": encoded_image,
    "picture": picture,
    "segment": segment,
    "search log": search_log,
}
