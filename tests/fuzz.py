"""Fuzzing of external files: python tests/fuzz.py [--seconds 60] [--seed 0].

Each kind of file starts as a valid one; bytes are flipped, cut, doubled, and spliced from another one. A reader may
accept the result or reject it with its own error (UserError, CorruptData, DamagedSegment, ValueError of an image);
any other exception is printed with the bytes that caused it, and the exit code is 1. Memory is limited to 4 GiB above
what the programs themselves need, so that a file that claims more ends the run.
"""

import base64
import contextlib
import io
import json
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from support.forged import forge

from ddpm.checkpoints import checkpoint
from ddpm.config import from_json, override, to_json
from ddpm.data.corrupt import CorruptData
from ddpm.data.image_folder import store
from ddpm.data.manifest import make_manifest, manifest_from_json
from ddpm.data.row_group import decode
from ddpm.data.shards import read_row_group, write_shard
from ddpm.presets import DIGITS
from ddpm.storage.locations import resolve
from ddpm.tracking import metrics_buffer
from ddpm.tracking.metrics_buffer import DamagedSegment, MetricsBuffer
from ddpm.training.state import State
from ddpm.utils.errors import UserError

SIDE = 8
GIB = 1 << 30


class Target:
    """A kind of file: `seeds` are valid files, and `read` returns whether the reader accepted one."""

    seeds: Sequence[bytes]
    is_json = False
    refusals: tuple[type[Exception], ...] = (UserError,)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def consume(self, data: bytes) -> None:
        raise NotImplementedError

    def read(self, data: bytes) -> bool:
        try:
            self.consume(data)
        except self.refusals as error:
            assert len(str(error)) < 2000, str(error)[:200]
            return False
        return True


def images(count: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, channels), np.uint8)


def image_file(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(images(1, 3)[0]).convert(mode).save(file, kind)
    return file.getvalue()


class Manifest(Target):
    is_json = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shard = write_shard(
            resolve(str(folder)), "train/00000.parquet", images(6), None, rows_per_row_group=3
        )
        manifest = make_manifest("test", SIDE, SIDE, 1, "raw", [], {"train": [shard]}, "")
        self.seeds = [json.dumps(asdict(manifest)).encode()]

    def consume(self, data: bytes) -> None:
        manifest_from_json(data, "manifest.json")


class Shard(Target):
    """The shard file; its manifest is not altered."""

    refusals = (CorruptData,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shard = write_shard(
            resolve(str(folder)), "train/00000.parquet", images(6), None, rows_per_row_group=3
        )
        self.manifest = make_manifest("test", SIDE, SIDE, 1, "raw", [], {"train": [shard]}, "")
        self.seeds = [(folder / shard.path).read_bytes()]

    def consume(self, data: bytes) -> None:
        (self.folder / "train/00000.parquet").write_bytes(data)
        read_row_group(resolve(str(self.folder)), self.manifest, "train", 1)


class Config(Target):
    is_json = True
    seeds = (to_json(DIGITS).encode(),)

    def consume(self, data: bytes) -> None:
        with contextlib.suppress(UnicodeDecodeError):  # raised by read_text, before our own code
            from_json(data.decode())


class Checkpoint(Target):
    """Weights with matching checksums, as an attacker would write them."""

    file = "ema.safetensors"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.set_num_threads(1)
        small = {"model.base_width": 4, "model.norm_groups": 2, "model.width_multipliers": [1, 2]}
        self.config = override(DIGITS, small)
        state = State.create(self.config, torch.device("cpu"))
        sum(p.square().sum() for p in state.net.parameters()).backward()  # type: ignore[union-attr]
        state.optimizer.step()
        state.step, state.images_seen = 1, self.config.train.batch_size
        checkpoint.write(state.snapshot(self.config, {"run_key": "k", "data_fingerprint": "f"}), folder)
        self.seeds = [(folder / self.file).read_bytes()]

    def consume(self, data: bytes) -> None:
        forge(self.folder, self.file, data)
        self.use()

    def use(self) -> None:
        checkpoint.load_net(self.folder, torch.device("cpu"))


class CheckpointConfig(Checkpoint):
    """config.json of a checkpoint, read for sampling."""

    file, is_json = "config.json", True


class CheckpointState(Checkpoint):
    """state.json of a checkpoint, read to resume."""

    file, is_json = "state.json", True

    def use(self) -> None:
        State.create(self.config, torch.device("cpu")).restore(self.folder, self.config)


class CheckpointOptimizer(CheckpointState):
    """AdamW's state."""

    file, is_json = "optimizer.safetensors", False


class EncodedImage(Target):
    """An image of a data set."""

    seeds = tuple(image_file(kind) for kind in ("PNG", "JPEG", "WEBP"))
    refusals = (ValueError,)

    def consume(self, data: bytes) -> None:
        assert decode(data, SIDE, SIDE, 3).shape == (SIDE, SIDE, 3)


class Picture(Target):
    """An image file of a user, to prepare."""

    seeds = (
        *(image_file(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")),
        image_file("PNG", "P"),
        image_file("PNG", "LA"),
        image_file("TIFF", "CMYK"),
    )

    def consume(self, data: bytes) -> None:
        assert store([(data, "it")], SIDE, 3, "raw").shape == (1, SIDE, SIDE, 3)


class Segment(Target):
    """A segment of a run's spool."""

    refusals = (DamagedSegment,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        buffer = MetricsBuffer()
        buffer.metrics({"train/loss": 0.5}, 1)
        buffer.image("samples", images(1)[0], 1)
        buffer.artifact("pictures/strip.txt", b"strip")
        self.seeds = [buffer.take() or b""]

    def consume(self, data: bytes) -> None:
        metrics_buffer.read(data, "segment")


TARGETS = [
    Manifest,
    Shard,
    Config,
    Checkpoint,
    CheckpointConfig,
    CheckpointState,
    CheckpointOptimizer,
    EncodedImage,
    Picture,
    Segment,
]


@dataclass(frozen=True)
class Arguments:
    """Duration and seed."""

    seconds: float = 60.0
    """Duration per kind of file."""
    seed: int = 0
    kinds: str = ""
    """Only kinds of files whose names start with this, such as Checkpoint."""


def altered(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        # Headers decide how much memory readers allocate.
        start = rng.randrange(min(len(data), 512) + 1) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice([0, 1, 1, 2, 4, 8, 64]))
        match rng.randrange(6):
            case 0 if start < len(data):
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                data[start:stop] = rng.randbytes(stop - start)
            case 2:
                data[start:stop] = b""
            case 3:
                data[start:start] = bytes(data[start:stop]) * rng.randrange(1, 5)
            case 4:
                data[start:stop] = rng.choice([b"\xff", b"\x00", b"\x7f"]) * (stop - start)
            case 5:
                other = rng.choice(seeds)
                begin = rng.randrange(len(other) + 1)
                data[start:stop] = other[begin : begin + rng.choice([1, 4, 16, 64])]
    return bytes(data)


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    warnings.simplefilter("ignore")  # Pillow's warnings about odd files
    failed = False
    for kind in [kind for kind in TARGETS if kind.__name__.startswith(arguments.kinds)]:
        with tempfile.TemporaryDirectory() as folder:
            target, rng = kind(Path(folder)), random.Random(arguments.seed)
            assert all(target.read(seed) for seed in target.seeds), f"{kind.__name__} refuses what is valid"
            limit_memory()
            found: Counter[str] = Counter()
            end, slowest = time.monotonic() + arguments.seconds, 0.0
            while (began := time.monotonic()) < end:
                data = altered(target.seeds, rng)
                try:
                    found["taken" if target.read(data) else "refused"] += 1
                except Exception as error:
                    name = f"{type(error).__name__}: {str(error)[:120]}"
                    if not found[name]:
                        print(f"{kind.__name__}: {name}\n{base64.b64encode(data).decode()}", file=sys.stderr)
                    found[name] += 1
                    failed = True
                slowest = max(slowest, time.monotonic() - began)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{kind.__name__:19} {found.total():8,} files, slowest {slowest:.2f} s, {peak:.0f} MiB, {dict(found)}"
            )
    return int(failed)


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * GIB, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())
