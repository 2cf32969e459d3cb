"""A buffer of metrics, pictures and files in memory, packed into segments: one file per checkpoint.

A segment is a zip without compression: `records.jsonl`, one JSON object per line, and the files it names.

    {"kind": "metrics", "values": {"train/loss": 0.5, "train/x": "nan"}, "images_seen": 64, "timestamp_ms": ...}
    {"kind": "image", "key": "samples", "file": "files/000001", "images_seen": 64, "timestamp_ms": ...}
    {"kind": "artifact", "name": "pictures/strip.png", "file": "files/000002"}
    {"kind": "tags", "tags": {"preset": "digits"}}
    {"kind": "data_set", "name": "digits", "digest": "4f0c...", "uri": "/data/digits", "profile": "{...}"}

Segments stay in a run's storage until they are delivered. A zip's own checksums detect a damaged file.
"""

import io
import json
import math
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, WrapValidator

from ddpm.utils import images, strict_json
from ddpm.utils.errors import UserError

INDEX = "records.jsonl"
NAME = re.compile(r"(\d{12,19})(-failed)?\.zip")
NON_FINITE = ("nan", "inf", "-inf")
MAX_SEGMENT_BYTES = 1 << 30
DAMAGE = (
    ValueError,
    KeyError,
    UserError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,  # a flag says that it is encrypted
)
"""Exceptions of reading a damaged zip or a damaged record."""


class DamagedSegment(UserError):
    """A file that is not a segment, or is damaged."""

    exit_code = 1


def _number(value: Any, parse: Callable[[Any], float]) -> float:
    """A number, or the name of one that is not finite, for which JSON has no number."""
    return float(value) if value in NON_FINITE else parse(value)


def _relative(name: str) -> str:
    """`name`, if it stays inside its folder, on every system."""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or ":" in name or {"", ".", ".."} & set(parts):
        raise ValueError(
            f"artifact {name!r:.80} is not a relative path; use names such as pictures/strip.png"
        )
    return name


Count = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class Metrics:
    """Values measured at one moment."""

    values: Mapping[str, Annotated[float, WrapValidator(_number)]]
    images_seen: Count
    timestamp_ms: Count
    kind: Literal["metrics"] = "metrics"


@dataclass(frozen=True)
class Picture:
    """One image of a series that is shown over time."""

    key: str
    png: bytes
    images_seen: Count
    timestamp_ms: Count
    kind: Literal["image"] = "image"


@dataclass(frozen=True)
class Artifact:
    """A file of the run, by its relative path; a later one of the same name replaces it."""

    name: Annotated[str, AfterValidator(_relative)]
    data: bytes
    kind: Literal["artifact"] = "artifact"


@dataclass(frozen=True)
class Tags:
    """Tags of the run; a later value of a tag replaces it."""

    tags: Mapping[str, str]
    kind: Literal["tags"] = "tags"


@dataclass(frozen=True)
class DataSetInput:
    """The data set that the run is trained on."""

    name: str
    digest: str
    """A hash of the images, at most 36 characters, MLflow's limit."""
    uri: str
    profile: str
    """JSON with further facts of the data set."""
    kind: Literal["data_set"] = "data_set"


Record = Metrics | Picture | Artifact | Tags | DataSetInput
"""The records; a line of records.jsonl has the fields of one."""
_ANY: Any = Annotated[Record, Field(discriminator="kind")]
BYTES = {"image": "png", "artifact": "data"}
"""The field of a kind that is a file in the zip; the record's line has the file's name as `file`."""


class MetricsBuffer:
    """Collects the records of one thread."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self.all_tags: dict[str, str] = {}

    def metrics(self, values: Mapping[str, float], images_seen: int) -> None:
        floats = {name: float(value) for name, value in values.items()}
        self._records.append(Metrics(floats, images_seen, _now_ms()))

    def image(self, key: str, image: NDArray[np.uint8], images_seen: int) -> None:
        """Keep `image`, uint8 [H, W, C], C 1 or 3, as a PNG."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            got = f"{image.dtype} {image.shape}"
            raise ValueError(f"image {key} is {got}; it must be uint8 [H, W, C], C 1 or 3")
        self._records.append(Picture(key, images.png_bytes(image), images_seen, _now_ms()))

    def artifact(self, name: str, data: bytes) -> None:
        """Keep `data` as the file `name`, a relative path such as pictures/strip.png."""
        self._records.append(Artifact(_relative(name), data))

    def tags(self, tags: Mapping[str, str]) -> None:
        self._records.append(Tags(dict(tags)))
        self.all_tags |= tags

    def data_set(self, data_set: DataSetInput) -> None:
        self._records.append(data_set)

    def take(self) -> list[Record]:
        """All records since the last take."""
        taken, self._records = self._records, []
        return taken


def segment_name(images_seen: int, after_error: bool = False) -> str:
    """File name of the segment up to `images_seen`; names sort in the order of delivery.

    Args:
        images_seen: position of the checkpoint that makes the segment final, 0 or more.
        after_error: the segment of a run that ends in an error, since its last checkpoint; no checkpoint follows. At
            one position it sorts first ("-" is less than "."), since a checkpoint there is committed by a later start
            of the run.
    """
    return f"{images_seen:012d}{'-failed' if after_error else ''}.zip"


def parse_name(name: str) -> tuple[int, bool] | None:
    """The inverse of `segment_name`; None: not the name of a segment."""
    match = NAME.fullmatch(name)
    if match is None or segment_name(int(match[1]), match[2] is not None) != name:
        return None
    return int(match[1]), match[2] is not None


def pack(records: list[Record]) -> bytes:
    """Pack `records` into a segment; equal records give equal bytes."""
    lines, file = [], io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for i, record in enumerate(records):
            line = dict(vars(record))
            if isinstance(record, Metrics):
                line["values"] = {k: v if math.isfinite(v) else str(v) for k, v in record.values.items()}
            if field := BYTES.get(record.kind):
                line["file"] = f"files/{i:06d}"
                archive.writestr(zipfile.ZipInfo(line["file"]), line.pop(field))
            lines.append(json.dumps(line, allow_nan=False) + "\n")
        archive.writestr(zipfile.ZipInfo(INDEX), "".join(lines))
    return file.getvalue()


def read(data: bytes, where: str) -> list[Record]:
    """The records of a segment, in their original order.

    Raises:
        DamagedSegment: it is not a whole segment; `where` names it.
    """
    with _as_damaged_segment(where), zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [_record(line, archive) for line in archive.read(INDEX).decode().splitlines()]


def count(file: IO[bytes], where: str) -> int:
    """Number of records of the segment in the seekable `file`, of which the index is read alone; or DamagedSegment."""
    with _as_damaged_segment(where), zipfile.ZipFile(file) as archive:
        return archive.read(INDEX).count(b"\n")


def _record(line: str, archive: zipfile.ZipFile) -> Record:
    fields = strict_json.parse(dict[str, Any], line, "a record")
    field = BYTES.get(str(fields.get("kind")))
    if field is None:
        return strict_json.parse(_ANY, line, "a record")
    content = archive.read(fields.pop("file"))
    record = strict_json.parse(_ANY, json.dumps({**fields, field: ""}), "a record")
    return replace(record, **{field: content})


@contextmanager
def _as_damaged_segment(where: str) -> Iterator[None]:
    """A context that turns DAMAGE into DamagedSegment."""
    try:
        yield
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedSegment(f"{where} is damaged, or not a tracking segment: {reason}") from None


def _now_ms() -> int:
    return int(time.time() * 1000)
