"""Data sets that torchvision has downloaded: CIFAR-10, MNIST, CelebA.

Nothing is downloaded here.

CIFAR-10: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
MNIST: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
CelebA: Liu et al. 2015, arXiv:1411.7766.

Axes: N images, H W, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ddpm.config import SmallCount
from ddpm.data.idx import missing_idx, read_idx_folder
from ddpm.data.image_folder import digest_of_files, read_file, store
from ddpm.data.manifest import Encoding
from ddpm.data.row_group import Labels, Pixels
from ddpm.data.sources import Loaded, MissingFiles
from ddpm.utils.errors import UserError
from ddpm.utils.files import read_whole

Dataset = Literal["cifar10", "mnist", "celeba"]
DATASETS = get_args(Dataset)
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CELEBA_PARTS = {"0": "train", "1": "validation", "2": "test"}
"""Split of each number in list_eval_partition.txt."""


@dataclass(frozen=True)
class Torchvision(Loaded):
    """CIFAR-10, MNIST or CelebA, as torchvision has downloaded it; each has its own splits."""

    dataset: Dataset
    """cifar10: 32x32 RGB, 10 classes. mnist: grey digits, 10 classes. celeba: RGB faces, no labels."""
    root: Path = Path("data")
    """The folder that was given to torchvision as root."""
    size: SmallCount | None = None
    """cifar10: 32. mnist: 32, with two black pixels added on every side, or 28. celeba: any, 64 unless given
    (the centre square of 178 pixels, resized)."""
    name: str = field(default="torchvision", init=False)

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:  # as in torchvision:DATASET of a config
            raise UserError(f"dataset is {self.dataset!r}; it must be one of {', '.join(DATASETS)}")
        allowed = {"cifar10": (32,), "mnist": (28, 32)}.get(self.dataset)
        if allowed and self.height not in allowed:
            raise UserError(
                f"--size is {self.size}; for {self.dataset} it must be {' or '.join(map(str, allowed))}"
            )
        _ = self.splits

    @property
    def height(self) -> int:
        return self.size if self.size is not None else (64 if self.dataset == "celeba" else 32)

    @property
    def channels(self) -> int:
        return 1 if self.dataset == "mnist" else 3

    @property
    def encoding(self) -> Encoding:
        return "encoded" if self.dataset == "celeba" else "raw"

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple({"mnist": "0123456789", "cifar10": CIFAR10_CLASSES, "celeba": ""}[self.dataset])

    @property
    def splits(self) -> dict[str, int]:
        if self.dataset == "celeba":
            return {split: len(files) for split, files in self._faces.items()}
        return super().splits

    def identity(self) -> dict[str, Any]:
        identity = {"name": self.name, "dataset": self.dataset, "size": self.height, "splits": self.splits}
        if self.dataset == "celeba":
            files = (file for files in self._faces.values() for file in files)
            identity["files"] = digest_of_files(self._folder, files)
        return identity

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels | Sequence[bytes], Labels | None]:
        if self.dataset == "celeba":
            files = map(read_file, self._faces[split][start:stop])
            return store(files, self.height, self.channels, self.encoding)
        return super().read(split, start, stop)

    @property
    def _folder(self) -> Path:
        folders = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py", "celeba": "celeba"}
        return self.root / folders[self.dataset]

    @cached_property
    def _images(self) -> dict[str, tuple[Pixels, Labels]]:
        if self.dataset == "mnist":
            if missing := missing_idx(self._folder):
                raise self._lacks(f"{missing}[.gz]")
            return read_idx_folder(self._folder)
        from torchvision.datasets import CIFAR10

        splits = {}
        for split in ("train", "test"):
            try:
                # These files are pickles: torchvision reads them only if their checksums are the published ones.
                images = CIFAR10(self.root, train=split == "train", download=False)
            except RuntimeError:
                raise self._lacks("files of CIFAR-10, or has damaged ones") from None
            splits[split] = (images.data, np.array(images.targets, np.int64))
        return splits

    @cached_property
    def _faces(self) -> dict[str, list[Path]]:
        partition, images = self._folder / "list_eval_partition.txt", self._folder / "img_align_celeba"
        splits: dict[str, list[Path]] = {split: [] for split in CELEBA_PARTS.values()}
        try:
            for file, part in (line.split() for line in read_whole(partition).decode().splitlines()):
                splits[CELEBA_PARTS[part]].append(images / file)
        except FileNotFoundError:
            raise self._lacks(partition.name) from None
        except (OSError, ValueError, KeyError):
            raise UserError(
                f"{partition} is damaged: each line must be a file's name and 0, 1 or 2"
            ) from None
        if lost := next((f for files in splits.values() for f in files if not f.is_file()), None):
            raise self._lacks(lost.relative_to(self._folder).as_posix())
        return {split: files for split, files in splits.items() if files}

    def _lacks(self, what: str) -> UserError:
        name = {"mnist": "MNIST", "cifar10": "CIFAR10", "celeba": "CelebA"}[self.dataset]
        return MissingFiles(
            f"{self._folder} lacks {what}; --root names the folder given to "
            f"torchvision.datasets.{name}(root, download=True), which fetches them",
            f"--dataset {self.dataset} --root FOLDER",
        )
