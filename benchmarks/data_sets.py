"""The same images for every contestant of data.py: as Parquet, MDS and tar shards in S3, and as files.

Every image shows its number, so that the order of a contestant's images can be read from the images.

Axes: N images, H W, C channels.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STORED = 256
TRAINED = 64
"""Sides of an encoded image: as stored, and as trained on."""
BITS = 16
"""Bits of the number that an encoded image shows in its top row, as squares of black and white."""


@dataclass(frozen=True)
class Case:
    """The images that are read."""

    name: str
    num_images: int

    @property
    def encoded(self) -> bool:
        return self.name == "encoded"

    @property
    def window(self) -> int:
        """Images that are shuffled among each other."""
        return 2048 if self.encoded else 8192

    @property
    def side(self) -> int:
        """Side of the images that arrive."""
        return TRAINED if self.encoded else 32


CASES = {case.name: case for case in (Case("raw", 200_000), Case("encoded", 12_288), Case("small", 32_768))}
FILES = 50_000
"""Largest number of image files."""
PACE = 4000
"""Images/s that the trainer of the case `small` takes, so that a wait is a stall."""


def raw(case: Case) -> NDArray[np.uint8]:
    """[N, 32, 32, 3]: noise, with the image's number in the first pixel."""
    images = np.random.default_rng(0).integers(0, 256, (case.num_images, 32, 32, 3), np.uint8)
    images[:, 0, 0] = np.arange(case.num_images)[:, None] >> np.array([0, 8, 16]) & 255
    return images


def encoded(case: Case) -> Iterator[bytes]:
    """JPEGs, quality 90, of parts of two photographs (scikit-learn's), each with its number in the top row."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    random = np.random.default_rng(0)
    for number in range(case.num_images):
        photograph = photographs[number % 2]
        size = int(random.integers(STORED, min(photograph.size)))
        left, top = (int(random.integers(0, side - size + 1)) for side in photograph.size)
        part = photograph.crop((left, top, left + size, top + size)).resize((STORED, STORED))
        pixels = np.array(part)
        bits = (number >> np.arange(BITS) & 1).astype(np.uint8) * 255
        pixels[: STORED // BITS] = np.repeat(bits, STORED // BITS)[:, None]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        yield file.getvalue()


def numbers(case: Case, batch: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[N], the numbers that the images [N, H, W, C] of a batch show."""
    if not case.encoded:
        return batch[:, 0, 0].astype(np.int64) @ (1 << np.array([0, 8, 16]))
    cell = TRAINED // BITS
    return (batch[:, cell // 2, cell // 2 :: cell, 1] > 127) @ (1 << np.arange(BITS))


def files(case: Case) -> Iterator[bytes]:
    """The content of each image's file: PNG of raw ones, the JPEG of encoded ones."""
    if case.encoded:
        yield from encoded(case)
        return
    for image in raw(case):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", compress_level=1)
        yield file.getvalue()


def write_files(case: Case, folder: Path) -> None:
    """One file per image, a thousand per folder."""
    for number, data in enumerate(files(case)):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.{'jpg' if case.encoded else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_shards(case: Case, uri: str) -> None:
    """Ours: the shards that `jobs/prepare.py` would write for these images."""
    from ddpm.data import prepare
    from ddpm.runs.storage import resolve

    prepare.prepare(_Source(case), resolve(uri))


class _Source:
    """The case as a source of `prepare`."""

    name = "benchmark"
    channels = 3
    class_names = ()

    def __init__(self, case: Case) -> None:
        self.height = self.width = STORED if case.encoded else case.side
        self.encoding = "encoded" if case.encoded else "raw"
        self.splits = {"train": case.num_images}
        self._images = list(encoded(case)) if case.encoded else raw(case)

    def identity(self) -> dict[str, str]:
        return {"name": self.name}

    def read(self, split: str, start: int, stop: int) -> tuple[Any, None]:
        return self._images[start:stop], None


def write_mds(case: Case, uri: str) -> None:
    """mosaicml-streaming's: raw images as arrays of a fixed shape, encoded ones as their bytes."""
    from streaming import MDSWriter

    kind = "bytes" if case.encoded else "ndarray:uint8:32,32,3"
    with MDSWriter(out=uri, columns={"image": kind}) as writer:
        for image in encoded(case) if case.encoded else raw(case):
            writer.write({"image": image})


def write_tar(case: Case, folder: Path) -> None:
    """webdataset's: tar files of 2,000 raw images, or of 500 encoded ones."""
    import webdataset

    per_shard, name = (500, "jpg") if case.encoded else (2000, "bin")
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=per_shard, verbose=0) as writer:
        for number, image in enumerate(encoded(case) if case.encoded else raw(case)):
            writer.write({"__key__": f"{number:06d}", name: image if case.encoded else image.tobytes()})
