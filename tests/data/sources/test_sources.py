"""Each source has the expected images in any range, and reports what is wrong with its files."""

import gzip
import hashlib
import io
import os
import pickle
import shlex
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import processes

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data import prepare_for_run
from ddpm.data.sources import torchvision
from ddpm.data.sources.sources import (
    Digits,
    MissingFiles,
    Source,
    divide,
    held_out,
    num_held_out,
)
from ddpm.data.sources.torchvision import FashionMnist, Torchvision
from ddpm.utils.errors import UserError

FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(
    not FASHION.exists(), reason="`apt install dataset-fashion-mnist` brings it"
)


def everything(source: Source, split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = source.read(split, 0, source.splits[split])
    assert isinstance(images, np.ndarray) and labels is not None
    assert images.shape == (source.splits[split], source.height, source.width, source.channels)
    assert images.dtype == np.uint8 and labels.dtype == np.int64 and len(labels) == len(images)
    return images, labels


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, zipped: bool = True) -> np.ndarray:
    """Write five training and two test images in MNIST's file format."""
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    folder.mkdir(parents=True)
    for prefix, part in (("train", slice(5)), ("t10k", slice(5, 7))):
        labels = np.arange(7, dtype=np.uint8)[part]
        for name, array in (("images-idx3", images[part]), ("labels-idx1", labels)):
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return images


def test_a_range_is_a_slice_of_the_whole() -> None:
    source = Digits()
    images, labels = everything(source, "train")
    part, part_labels = source.read("train", 7, 23)
    assert (np.asarray(part) == images[7:23]).all()
    assert part_labels is not None and (part_labels == labels[7:23]).all()


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    known = load_digits()
    source = Digits()
    assert source.splits == {"train": 1500, "test": 297}
    train = everything(source, "train")
    test = everything(source, "test")
    ours = sorted(
        (bytes(image), label)
        for images, labels in (train, test)
        for image, label in zip(images, labels.tolist(), strict=True)
    )
    levels = np.array([round(v * 255 / 16) for v in range(17)], np.uint8)[known.images.astype(int)]
    assert ours == sorted((bytes(i), label) for i, label in zip(levels, known.target.tolist(), strict=True))


def test_held_out_images_depend_only_on_the_seed() -> None:
    rows = held_out(100, seed=0, num_test=5)
    assert sorted([*rows["train"].tolist(), *rows["test"].tolist()]) == list(range(100))
    known = [2, 26, 55, 75, 86]  # must not change: data sets were made with it
    assert sorted(rows["test"].tolist()) == known
    assert rows["test"].tolist() != held_out(100, seed=1, num_test=5)["test"].tolist()
    with pytest.raises(UserError, match="1 image"):
        held_out(1, seed=0)
    with pytest.raises(UserError, match="test_images is 3"):
        held_out(3, seed=0, num_test=3)


def test_of_few_images_more_are_held_out() -> None:
    """At least 20 from 100 images on, which an evaluation needs, and never fewer for more images."""
    sizes = (2, 3, 20, 60, 99, 100, 200, 300, 1000, 1999, 2000, 60_000)
    assert [num_held_out(n) for n in sizes] == [1, 1, 4, 12, 19, 20, 20, 30, 100, 100, 100, 3000]
    every = [num_held_out(n) for n in range(2, 5000)]
    assert every == sorted(every)
    assert len(held_out(300, seed=0)["test"]) == 30


def test_the_splits_of_a_source_are_kept() -> None:
    assert {s: (part, len(rows)) for s, (part, rows) in divide({"train": 8, "validation": 4}, 0).items()} == {
        "train": ("train", 8),
        "test": ("validation", 4),
    }
    own = divide({"train": 8, "validation": 4, "test": 2}, 0)
    assert {s: (part, sorted(rows.tolist())) for s, (part, rows) in own.items()} == {
        "train": ("train", list(range(8))),
        "validation": ("validation", list(range(4))),
        "test": ("test", list(range(2))),
    }
    assert own["train"][1].tolist() != list(range(8))


@needs_fashion
def test_fashion_mnist() -> None:
    source = FashionMnist()
    assert source.splits == {"train": 60_000, "test": 10_000}
    images, labels = source.read("train", 0, 10)
    first = ["Ankle boot", "T-shirt/top", "T-shirt/top", "Dress"]
    assert [source.class_names[i] for i in labels[:4]] == first
    assert images.shape == (10, 32, 32, 1)
    assert not images[:, [0, 1, 30, 31]].any() and not images[:, :, [0, 1, 30, 31]].any()
    plain, _ = FashionMnist(size=28).read("train", 0, 10)
    assert (images[:, 2:30, 2:30] == plain).all()


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_files_of_torchvision(tmp_path: Path, zipped: bool) -> None:
    images = write_mnist(tmp_path / "MNIST/raw", zipped)
    source = Torchvision("mnist", root=tmp_path)
    assert source.splits == {"train": 5, "test": 2}
    read, labels = everything(source, "test")
    assert (read[:, 2:30, 2:30, 0] == images[5:]).all() and labels.tolist() == [5, 6]


def test_missing_and_damaged_idx_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MNIST/raw lacks train-images"):
        Torchvision("mnist", root=tmp_path)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.*--path FOLDER"):
        FashionMnist(path=tmp_path)
    write_mnist(tmp_path / "f")
    path = tmp_path / "f/t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    short = gzip.compress(gzip.decompress(whole)[:-1])
    for damaged in (whole[:-9], b"", b"no gzip", short, gzip.compress(b"\0\0\x08\x03\0")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="t10k-images-idx3-ubyte"):
            _ = FashionMnist(path=tmp_path / "f").splits
    path.write_bytes(gzip.compress(idx(np.zeros((3, 28, 28), np.uint8))))
    with pytest.raises(UserError, match="t10k-images"):
        _ = FashionMnist(path=tmp_path / "f").splits


def test_celeba_is_cropped_to_its_centre(tmp_path: Path) -> None:
    folder = tmp_path / "celeba/img_align_celeba"
    folder.mkdir(parents=True)
    portrait = np.zeros((218, 178, 3), np.uint8)
    portrait[20:198] = (0, 0, 255)  # the centre square is blue, the rest above and below is black
    for i in range(4):
        Image.fromarray(portrait).save(folder / f"{i:06d}.jpg", quality=95)
    partition = folder.parent / "list_eval_partition.txt"
    partition.write_text("000000.jpg 0\n000001.jpg 1\n000002.jpg 2\n000003.jpg 0\n")
    source = Torchvision("celeba", root=tmp_path)
    assert source.splits == {"train": 2, "validation": 1, "test": 1} and source.class_names == ()
    images, labels = source.read("train", 0, 2)
    assert labels is None and len(images) == 2
    with Image.open(io.BytesIO(bytes(images[0]))) as image:
        stored = np.asarray(image)
    assert stored.shape == (64, 64, 3) and stored[1:-1, :, 2].min() > 200 and stored[..., 0].max() < 50
    (folder / "000003.jpg").unlink()
    with pytest.raises(UserError, match=r"img_align_celeba/000003\.jpg; --root"):
        Torchvision("celeba", root=tmp_path)
    partition.write_text("000000.jpg 7\n")
    with pytest.raises(UserError, match=r"list_eval_partition\.txt is damaged"):
        Torchvision("celeba", root=tmp_path)


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
CLASSES = [3, 1, 9, 0]


def text2(value: bytes) -> bytes:
    """The opcodes of a string of Python 2."""
    return b"T" + struct.pack("<i", len(value)) + value


def batch_of_python_2() -> bytes:
    """A batch as Python 2 and NumPy 1 pickled those of CIFAR-10, by protocol 2, opcode by opcode."""
    kind = b"cnumpy\ndtype\n" + text2(b"u1") + b"K\x00K\x01\x87R(K\x03" + text2(b"|") + b"NNNJ" + b"\xff" * 4
    kind += b"J" + b"\xff" * 4 + b"K\x00tb"
    shape = b"K\x04M" + struct.pack("<H", 3 * 32 * 32) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text2(b"b") + b"\x87R"
    array += b"(K\x01" + shape + kind + b"\x89" + text2(PIXELS.tobytes()) + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in CLASSES) + b"e"
    return b"\x80\x02}(" + text2(b"data") + array + text2(b"labels") + labels + b"u."


def write_cifar10(root: Path, batch: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a data set of a batch for each split, and take its checksum for the published one."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(exist_ok=True)
    md5 = hashlib.md5(batch).hexdigest()
    names = {"train": "data_batch_1", "test": "test_batch"}
    for name in names.values():
        (folder / name).write_bytes(batch)
    monkeypatch.setattr(torchvision, "CIFAR10_FILES", {split: {name: md5} for split, name in names.items()})


@pytest.mark.parametrize("python", [2, 3])
def test_cifar10_files_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: int) -> None:
    batch = batch_of_python_2()
    known = pickle.loads(batch, encoding="latin1")  # it is what NumPy reads
    assert np.array_equal(known["data"], PIXELS.reshape(4, -1)) and known["labels"] == CLASSES
    if python == 3:
        batch = pickle.dumps(known, protocol=4)
    write_cifar10(tmp_path, batch, monkeypatch)
    source = Torchvision("cifar10", root=tmp_path)
    images, labels = everything(source, "train")
    assert (images == PIXELS.transpose(0, 2, 3, 1)).all() and labels.tolist() == CLASSES
    assert source.class_names[3] == "cat"
    with pytest.raises(UserError, match="--size is 64; for cifar10 it must be 32"):
        Torchvision("cifar10", size=64)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(b"another")
    with pytest.raises(UserError, match=r"CIFAR-10.*test_batch.*--root"):
        Torchvision("cifar10", root=tmp_path)


def test_the_published_checksums_of_cifar10_are_those_of_torchvision() -> None:
    from torchvision.datasets import CIFAR10

    assert {"train": dict(CIFAR10.train_list), "test": dict(CIFAR10.test_list)} == torchvision.CIFAR10_FILES


class Executed:
    """Its pickle makes a file in the working folder."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


HOSTILE = {
    "a call": pickle.dumps(Executed()),
    "a call inside": pickle.dumps({"data": Executed(), "labels": []}, protocol=2),
    "a call as text": b"cposix\nsystem\n(S'touch executed'\ntR.",
    "an instance": b"(S'touch executed'\niposix\nsystem\n.",
    "an attribute of NumPy": pickle.dumps(np.testing.measure, protocol=4),
    "a part of a part": b"\x80\x04\x8c\x05numpy\x8c\x1actypeslib.os.system.__call__.\x93.",
    "an array of objects": pickle.dumps({"data": np.array([Executed()]), "labels": [0]}, protocol=4),
    "an array of numbers": pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}, protocol=4),
    "a state of a class": b"cnumpy\ndtype\n}S'code'\nS'u1'\nsb.",
    "bytes of Python 3": pickle.dumps({"data": b"", "labels": []}, protocol=2),
    "no array": pickle.dumps({"data": "", "labels": []}),
    "too few labels": pickle.dumps({"data": PIXELS.reshape(4, -1), "labels": [0]}, protocol=4),
    "large labels": pickle.dumps({"data": PIXELS.reshape(4, -1), "labels": [10] * 4}, protocol=4),
    "nothing": b"",
    "a part": batch_of_python_2()[:-300],
}


@pytest.mark.parametrize("batch", HOSTILE.values(), ids=list(HOSTILE))
def test_no_pickle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: bytes) -> None:
    """Whatever a pickle of the right checksum holds, it is an error of one line."""
    write_cifar10(tmp_path, batch, monkeypatch)
    with pytest.raises(UserError, match="data_batch_1 is not a batch of CIFAR-10: ") as caught:
        Torchvision("cifar10", root=tmp_path)
    assert "\n" not in str(caught.value) and not Path("executed").exists()


@pytest.mark.parametrize("source", ["torchvision:cifar10", "torchvision:celeba", "fashion-mnist"])
def test_training_on_missing_files_says_how_to_prepare_them(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """prepare.py, unlike train.py, has a flag for their location."""
    monkeypatch.setattr(FashionMnist, "__init__", _without_files)
    config = override(Config(), {"data.source": source})
    with pytest.raises(UserError) as raised:
        prepare_for_run.prepared(config, "ddpm train preset")
    _, prepare, _, train, _ = str(raised.value).split("`")
    words = shlex.split(prepare)
    assert train == f"ddpm train preset --data {words[3]}"
    refused = processes.run_job("prepare", *(word.replace("FOLDER", "absent") for word in words[2:]))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: absent")


def _without_files(self: FashionMnist) -> None:
    raise MissingFiles("no files", "--path FOLDER")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:svhn", "dataset is 'svhn'"),
        ("torchvision", "data.source is 'torchvision'"),
        ("nothing", "data.source is 'nothing'"),
        (None, "no images are given: --data.images FOLDER, or a data set"),
    ],
)
def test_a_source_that_training_cannot_prepare_is_a_user_error(name: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_for_run.prepared(override(Config(), {"data.source": name}))
