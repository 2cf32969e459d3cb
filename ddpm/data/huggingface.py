"""Parquet files as Hugging Face writes them: a column of images (struct of bytes and path), one of labels.

Files are read from this machine's disk, row group by row group; nothing is downloaded. (Hugging Face's `datasets` 5.2
copies such files into its cache, or streams them without knowing their number or reading a range.)
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddpm.data.image_folder import PARTS, Listing, Picture, Pictures, list_files
from ddpm.data.row_group import Labels
from ddpm.data.sources import MAX_EXAMINED, divide
from ddpm.utils.errors import UserError

MAX_CLASSES = 100_000


@dataclass(frozen=True)
class HuggingFace(Pictures):
    """Hugging Face's Parquet files of images. A file called train-..., test-... or validation-... (or in a
    folder of that name) belongs to that split."""

    image_column: str = "image"
    label_column: str | None = "label"
    """A column of whole numbers. None, or a column that is not there: no labels."""
    name: str = field(default="parquet", init=False)

    def __post_init__(self) -> None:
        for file in self._all_files:
            self._check_columns(file)
        _ = self.splits, self.class_names

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names from the metadata that Hugging Face writes; else the numbers."""
        if self._label is None:
            return ()
        labels = set[int | None]()
        for file in self._all_files:
            labels.update(pq.read_table(file, columns=[self._label])[self._label].unique().to_pylist())
        largest = max((label for label in labels if label is not None), default=0)
        numbers = tuple(map(str, range(min(largest + 1, MAX_CLASSES))))
        names = _names_in(pq.read_schema(self._all_files[0]), self._label) or numbers
        if unknown := labels - set(range(len(names))):
            raise UserError(
                f"{self.path}: column {self._label!r} holds the label {unknown.pop()}, which is not in "
                f"0..{len(names) - 1}; choose another column with --label-column, or None for no labels"
            )
        return names

    def statistics(self) -> str:
        if sum(self.splits.values()) > MAX_EXAMINED:  # all files would be read once more
            return f"sizes not counted: there are more than {MAX_EXAMINED:,} images"
        return super().statistics()

    def _pictures(self, part: str, rows: Labels) -> Iterator[Picture]:
        """The images of `rows`, which must ascend."""
        columns = [self.image_column] + ([self._label] if self._label else [])
        begin = 0
        for file, row_group, num_rows in self._row_groups[part]:
            inside = rows[(rows >= begin) & (rows < begin + num_rows)] - begin
            begin += num_rows
            if not len(inside):
                continue
            try:
                table = pq.ParquetFile(file).read_row_group(row_group, columns=columns).take(inside)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"cannot read {file}: {error}") from None
            for row, values in zip(inside.tolist(), table.to_pylist(), strict=True):
                value = values[self.image_column]
                data = value["bytes"] if isinstance(value, dict) else value
                if data is None:
                    data = ValueError("it has no bytes; only images inside the file can be read")
                yield data, f"{file}, row group {row_group}, row {row}", values.get(self._label or "")

    def _check_columns(self, file: Path) -> None:
        """Raise UserError if the file's columns are not those of images and labels."""
        schema = _schema_of(file)
        kinds = dict(zip(schema.names, schema.types, strict=True))
        known = ", ".join(kinds)
        image, label = kinds.get(self.image_column), kinds.get(self._label or "")
        if image is not None and pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
            image = image.field("bytes").type
        if image not in (pa.binary(), pa.large_binary()):
            raise UserError(
                f"{file}: column {self.image_column!r} is {image or 'missing'}; it must hold the bytes of "
                f"images: choose another with --image-column, one of {known}"
            )
        if self._label and (label is None or not pa.types.is_integer(label)):
            raise UserError(
                f"{file}: column {self._label!r} is {label or 'missing'}; it must hold whole numbers: choose "
                f"another with --label-column, one of {known}, or None for no labels"
            )

    @property
    def _top(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def _listing(self) -> Listing:
        return list_files(self.path, {".parquet"}) if self.path.is_dir() else ([self.path], [])

    @property
    def _skipped(self) -> list[Path]:
        return self._listing[1]

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """The files of each part; "train" if a name tells no part."""
        files = sorted(self._listing[0])
        if not files or not files[0].is_file():
            raise UserError(f"{self.path} is neither a Parquet file nor a folder with *.parquet files")
        parts: dict[str, list[Path]] = {}
        for file in files:
            # "data/train-00000-of-00002.parquet", "default/train/0000.parquet"
            words = [re.split(r"[-_.]", word)[0] for word in reversed(file.relative_to(self._top).parts)]
            parts.setdefault(next((PARTS[word] for word in words if word in PARTS), "train"), []).append(file)
        if "train" not in parts:
            raise UserError(f"{self.path} has files of {' and '.join(parts)} only; train is missing")
        return parts

    @property
    def _all_files(self) -> list[Path]:
        return [file for files in self._files.values() for file in files]

    @cached_property
    def _label(self) -> str | None:
        """The column of labels, if the first file has it."""
        return self.label_column if self.label_column in _schema_of(self._files["train"][0]).names else None

    @cached_property
    def _row_groups(self) -> dict[str, list[tuple[Path, int, int]]]:
        """For each part its row groups in order: file, index in the file, rows."""
        groups: dict[str, list[tuple[Path, int, int]]] = {part: [] for part in self._files}
        for part, files in self._files.items():
            for file in files:
                data = pq.read_metadata(file)
                groups[part] += [(file, i, data.row_group(i).num_rows) for i in range(data.num_row_groups)]
        return groups

    @cached_property
    def _rows(self) -> dict[str, tuple[str, Labels]]:
        sizes = {part: sum(rows for _, _, rows in groups) for part, groups in self._row_groups.items()}
        # In the files' order, so that a range of rows lies in few row groups; Hugging Face's sets are shuffled.
        return {split: (part, np.sort(rows)) for split, (part, rows) in divide(sizes, self.seed).items()}


def _schema_of(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {file}: {error}") from None


def _names_in(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The class names that Hugging Face keeps in a schema's metadata; empty if there are none."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
        return tuple(str(name) for name in names)
    except (TypeError, KeyError, ValueError):
        return ()
