"""Data sets of images that Hugging Face's `datasets` reads: Parquet files, a saved data set, or one of the hub.

`datasets` copies Parquet files into its cache (HF_HOME), and maps it into memory. Since version 4 it runs no program of
a data set.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from ddpm.data.row_group import Labels
from ddpm.data.sources.conversion import ImageFile
from ddpm.data.sources.image_folder import ImageFiles, list_files
from ddpm.data.sources.sources import by_part
from ddpm.utils.errors import UserError
from ddpm.utils.retry import error_line

MAX_CLASSES = 100_000
ROWS_AT_ONCE = 256
"""Rows that are in memory while images are read one by one."""
HUB_TIMEOUT_S = 10.0
EXPECTED = "it must be a Parquet file or a folder of them, what save_to_disk wrote, or a name on the Hugging Face hub"
SAVED = ("dataset_dict.json", "state.json")
"""`save_to_disk` writes one of these files."""


@dataclass(frozen=True)
class HuggingFace(ImageFiles):
    """Images of a Hugging Face data set: Parquet files, what save_to_disk wrote, or a name on the hub. Hugging Face's
    datasets takes the splits of a folder from the names in it (train-..., test/...), and copies Parquet files into its
    cache (HF_HOME)."""

    image_column: str = "image"
    label_column: str | None = "label"
    """A column of whole numbers. None, or a column that is not there: no labels."""
    name: str = field(default="parquet", init=False)

    def __post_init__(self) -> None:
        # Images that cannot be used are an error here.
        _ = self.splits
        _ = self.class_names

    def __getstate__(self) -> dict[str, Any]:
        """Without the data: each machine has a cache of its own."""
        return {key: value for key, value in self.__dict__.items() if key != "_data"}

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of a ClassLabel; else the numbers."""
        if self._label is None:
            return ()
        labels = {label for data in self._data.values() for label in data.unique(self._label)}
        names = getattr(self._data["train"].features[self._label], "names", None)
        if names is None:
            largest = max((label for label in labels if label is not None), default=0)
            names = [str(label) for label in range(min(largest + 1, MAX_CLASSES))]
        for label in labels:
            if label not in range(len(names)):
                raise UserError(
                    f"{self.path}: column {self._label!r} holds the label {label}, which is not in "
                    f"0..{len(names) - 1}; choose another column with --label-column, or None for no labels"
                )
        return tuple(names)

    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        if not self.path.exists():
            identity["path"] = str(self.path)  # with the sizes of its splits, the name identifies it
        identity["order"] = "seeded"  # once it was the data set's own
        return identity

    def _image_files(self, part: str, rows: Labels) -> Iterator[ImageFile]:
        data = self._data[part]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE].tolist()
            columns = data[some]
            labels = columns[self._label] if self._label else [None] * len(some)
            for row, image, label in zip(some, columns[self.image_column], labels, strict=True):
                content = image["bytes"]
                if content is None:
                    content = ValueError("it has no bytes; only images inside the data set can be read")
                yield ImageFile(content, f"{self.path}, {part}, row {row}", label)

    @property
    def _top(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def _is_saved(self) -> bool:
        """Whether save_to_disk wrote the folder."""
        return any((self.path / name).is_file() for name in SAVED)

    @property
    def _all_files(self) -> list[Path]:
        if self.path.is_dir():
            return list_files(self.path, {".arrow", ".json"} if self._is_saved else {".parquet"}).files
        return [self.path] if self.path.exists() else []  # a name on the hub has no files here

    @cached_property
    def _data(self) -> dict[str, Any]:
        """The datasets.Dataset of each part; its images are {"bytes": ..., "path": ...}."""
        try:
            import datasets
        except ImportError:
            raise UserError(
                "the source parquet needs the package datasets: pip install 'ddpm-on-ray[huggingface]'"
            ) from None
        if not self.path.exists():
            self._check_name()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised, too
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        try:
            if self._is_saved:
                loaded = datasets.load_from_disk(self.path)
            elif self.path.is_file():
                loaded = datasets.load_dataset("parquet", data_files=str(self.path))
            elif self.path.is_dir():
                loaded = datasets.load_dataset("parquet", data_dir=str(self.path))
            else:
                loaded = datasets.load_dataset(str(self.path))  # a name on the hub
        except Exception as error:  # of many types, for example of pyarrow and of httpx
            raise UserError(f"cannot read {self.path}: {error_line(error)}; {EXPECTED}") from None
        if not isinstance(loaded, dict):
            loaded = {"train": loaded}
        parts = by_part(loaded.items(), str(self.path))
        return {part: self._checked(data) for part, data in parts.items()}

    def _check_name(self) -> None:
        """Raise UserError if the path cannot be a name on the hub, or the hub is not reached and was not before.

        `datasets` would try to reach it six times, in 23 s, before it looks into its cache.
        """
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        if self.path.is_absolute() or self.path.suffix == ".parquet":
            raise UserError(f"cannot read {self.path}: it does not exist; {EXPECTED}")
        name = str(self.path)
        try:
            huggingface_hub.dataset_info(name, timeout=HUB_TIMEOUT_S)
        except (HfHubHTTPError, OfflineModeIsEnabled, ValueError):
            return  # `datasets` gets the same answer at once, or does not ask
        except Exception as error:  # of the HTTP client, which differs from version to version
            if huggingface_hub.try_to_load_from_cache(name, "README.md", repo_type="dataset") is None:
                raise UserError(
                    f"cannot read {name}: no such file or folder is here, and the Hugging Face hub is not reached "
                    f"({error_line(error)}); {EXPECTED}"
                ) from None

    def _checked(self, data: Any) -> Any:
        """The columns of images and of labels. Images are not decoded: those that fit keep their bytes."""
        from datasets import Image

        known = ", ".join(data.column_names)
        columns = [self.image_column]
        if self.label_column is not None and self.label_column in data.column_names:
            columns.append(self.label_column)
            kind = data.features.arrow_schema.field(self.label_column).type
            if not pa.types.is_integer(kind):
                raise UserError(
                    f"{self.path}: column {self.label_column!r} is {kind}; it must hold whole numbers: choose another "
                    f"with --label-column, one of {known}, or None for no labels"
                )
        try:
            return data.select_columns(columns).cast_column(self.image_column, Image(decode=False))
        except (ValueError, TypeError, KeyError, pa.ArrowException):
            raise UserError(
                f"{self.path}: column {self.image_column!r} is {data.features.get(self.image_column, 'missing')}; it "
                f"must hold images: choose another with --image-column, one of {known}"
            ) from None

    @cached_property
    def _label(self) -> str | None:
        """The column of labels, if all parts have it."""
        has_labels = all(self.label_column in data.column_names for data in self._data.values())
        return self.label_column if has_labels else None

    @property
    def _part_sizes(self) -> dict[str, int]:
        return {part: len(data) for part, data in self._data.items()}
