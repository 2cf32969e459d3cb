"""The data loaders of data.py: ours and the alternatives, each used as its documentation advises.

A contestant is a function that yields batches of BATCH images, uint8 [64, H, W, 3], as a trainer gets them. Encoded
images are decoded "as documented", with Pillow and torchvision's Resize; with Pillow's draft mode; and with our
decoder, to separate its effect from the loader's.
"""

import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_sets import STORED, TRAINED, Case
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

BATCH = 64
WORKERS = 2
"""Workers of a DataLoader: one per core."""
Decode = Callable[[bytes], NDArray[np.uint8]]


def documented(data: bytes) -> NDArray[np.uint8]:
    """Pillow, RGB, torchvision's Resize with its defaults: what the peers' documentation and examples do."""
    from torchvision.transforms.v2 import functional

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(functional.resize(image.convert("RGB"), [TRAINED, TRAINED]))


def drafted(data: bytes) -> NDArray[np.uint8]:
    """Pillow, decoding at a fraction of the size."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (TRAINED, TRAINED))
        return np.asarray(image.convert("RGB"))


def decode_as_ours(data: bytes) -> NDArray[np.uint8]:
    from ddpm.data.row_group import decode

    return decode(data, STORED, STORED, 3, STORED // TRAINED)


def _raw(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).reshape(32, 32, 3)


def mosaicml_streaming(
    case: Case, bucket: str, folder: Path, decode: Decode, start: int = 0
) -> Iterator[Tensor]:
    """StreamingDataset and StreamingDataLoader with default shuffling: all images, since they are so few.

    Downloads stay in `folder`; a bucket that is a folder is read as in every epoch but the first.
    """
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # an aborted run leaves it, and it would be waited for

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> Any:
            image = super().__getitem__(index)["image"]
            return decode(image) if case.encoded else image

    images = Images(
        remote=f"{bucket}/mds/{case.name}" if "://" in bucket else None,
        local=str(folder / "mds") if "://" in bucket else bucket,
        batch_size=BATCH,
        shuffle=True,
        shuffle_seed=0,
        predownload=case.window,
    )
    loader = StreamingDataLoader(images, **_options())
    if start:
        loader.load_state_dict(images.state_dict(start, from_beginning=True))
    while True:
        yield from loader


def webdataset(case: Case, bucket: str, folder: Path, decode: Decode, start: int = 0) -> Iterator[Tensor]:
    """WebDataset and WebLoader: shards shuffled, then a buffer of images over all workers; batched in them."""
    import webdataset as wds
    from webdataset.gopen import gopen_schemes

    from ddpm.runs.storage import resolve

    location = resolve(f"{bucket}/tar/{case.name}")
    urls = [f"{bucket}/tar/{case.name}/{name}" for name in location.files()]
    gopen_schemes["s3"] = _open_s3
    convert = (lambda sample: decode(sample["jpg"])) if case.encoded else (lambda sample: _raw(sample["bin"]))
    images = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=0, nodesplitter=None)
        .shuffle(case.window // WORKERS, initial=case.window // WORKERS)
        .map(convert)
        .batched(BATCH, collation_fn=_stacked, partial=False)
    )
    loader = wds.WebLoader(images, **_options() | {"batch_size": None})
    while True:
        yield from loader


def dataloader(case: Case, bucket: str, folder: Path, decode: Decode, start: int = 0) -> Iterator[Tensor]:
    """torch's DataLoader over image files on the local disk."""

    class Images(torch.utils.data.Dataset[NDArray[np.uint8]]):
        def __init__(self) -> None:
            self.files = sorted(map(str, Path(bucket, case.name).rglob("*.*")))

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> NDArray[np.uint8]:
            data = Path(self.files[index]).read_bytes()
            if case.encoded:
                return decode(data)
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image)

    loader = torch.utils.data.DataLoader(Images(), shuffle=True, drop_last=True, **_options())
    while True:
        yield from loader


def _options() -> dict[str, Any]:
    return {
        "batch_size": BATCH,
        "num_workers": WORKERS,
        "prefetch_factor": 4,
        "persistent_workers": True,
        "collate_fn": _stacked,
    }


def _stacked(images: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(images))


def _open_s3(url: str, mode: str = "rb", bufsize: int = 0, **options: Any) -> Any:
    """Open with pyarrow, as ours does."""
    location = _located(url.rpartition("/")[0])
    return location.filesystem.open_input_stream(
        f"{location.path}/{url.rpartition('/')[2]}", buffer_size=1 << 20
    )


@functools.cache
def _located(uri: str) -> Any:
    from ddpm.runs.storage import resolve

    return resolve(uri)
