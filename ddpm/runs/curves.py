"""A run's curves in its own folder: a copied run can be compared anywhere, and sent to any MLflow.

    metrics/000000000-000000350.parquet  metrics/000000350-000000420.parquet  ...

    name: string, images_seen: int64, value: float64 (may be nan), timestamp_ms: int64

The parts are one table, in the order in which its rows were recorded; a part's name has the numbers of its first row
and of the row after its last one. Rank 0 writes a part before each checkpoint. A row is final: a value of the same name
and position that is measured again, after a crash, is not recorded again (training/store.py).

`merge` replaces all parts by one. If it is killed before it has removed them, they lie inside the rows of the merged
part, are ignored, and go with the next merge. Runs of version 0.1 have one file, metrics.parquet, which holds the
first rows.
"""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError

FOLDER = "metrics"
FILE_0_1 = "metrics.parquet"
PART = re.compile(r"(?P<first>\d{9,})-(?P<end>\d{9,})\.parquet")
_TYPES: Any = {
    "name": pa.string(),
    "images_seen": pa.int64(),
    "value": pa.float64(),
    "timestamp_ms": pa.int64(),
}
SCHEMA = pa.schema(_TYPES)
MAX_BYTES = 1 << 30
READERS = 8
"""Parts that are read at a time."""
TRIES = 3
"""A part may be merged into another one between listing and reading."""


class CurveRow(NamedTuple):
    """One value of a curve."""

    name: str
    images_seen: int
    value: float
    timestamp_ms: int


class Point(NamedTuple):
    """One point of a curve."""

    images_seen: int
    value: float
    timestamp_ms: int


class Part(NamedTuple):
    """The rows `first` to `end` - 1."""

    first: int
    end: int
    file: Location


def read(run: Location) -> dict[str, list[Point]]:
    """The curves in a run's folder by name, each ascending."""
    curves: dict[str, dict[int, Point]] = {}
    for row in to_rows(read_rows(run)):
        point = Point(row.images_seen, row.value, row.timestamp_ms)
        curves.setdefault(row.name, {}).setdefault(row.images_seen, point)
    return {name: [curve[at] for at in sorted(curve)] for name, curve in sorted(curves.items())}


def read_rows(run: Location, first: int = 0, damaged: Callable[[str], object] | None = None) -> pa.Table:
    """The rows from number `first` on, in the order in which they were recorded.

    Args:
        damaged: called with a line for each damaged part, whose rows are left out; None: such a part raises UserError.
    """
    for tries_left in reversed(range(TRIES)):
        parts = _parts(run)
        missing = _missing(parts, first)
        if missing and tries_left:
            continue
        try:
            return _read_parts(parts, first, missing, run, damaged)
        except FileNotFoundError:
            if not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def to_rows(table: pa.Table) -> list[CurveRow]:
    """The rows of a table of `read_rows`."""
    columns = table.to_pydict()
    values = zip(
        columns["name"], columns["images_seen"], columns["value"], columns["timestamp_ms"], strict=True
    )
    return [CurveRow(name, images_seen, value, time_ms) for name, images_seen, value, time_ms in values]


def num_rows(run: Location) -> int:
    """The number of rows recorded."""
    return max((part.end for part in _parts(run)), default=0)


def part(first: int, rows: list[CurveRow]) -> tuple[str, bytes]:
    """Name in the run's folder and content of a part with `rows`, the first of which has the number `first`."""
    table = pa.Table.from_pylist([row._asdict() for row in rows], schema=SCHEMA)
    return _name(first, first + len(rows)), _to_bytes(table)


def merge(run: Location, damaged: Callable[[str], object]) -> pa.Table:
    """Replace all parts by one, which this returns; a damaged part is left out, with a line to `damaged`."""
    files = _files(run)
    lost = list[str]()
    table = read_rows(run, 0, lost.append)
    for line in lost:
        damaged(line)
    if len(files) > 1 and not lost:
        whole = run.child(_name(0, max(part.end for part in files)))
        whole.write(_to_bytes(table), durable=True)
        for old in files:
            if old.file.path != whole.path:
                old.file.unlink()
    return table


def _name(first: int, end: int) -> str:
    return f"{FOLDER}/{first:09d}-{end:09d}.parquet"


def _parts(run: Location) -> list[Part]:
    """The parts, ascending, without those that lie inside another one."""
    parts = list[Part]()
    for part in sorted(_files(run), key=lambda part: (part.first, -part.end)):
        if not parts or part.end > parts[-1].end:
            parts.append(part)
    return parts


def _files(run: Location) -> list[Part]:
    """All parts, those included that a killed merge has left."""
    folder = run.child(FOLDER)
    named = [(match, folder.child(name)) for name in folder.files() if (match := PART.fullmatch(name))]
    found = [Part(int(match["first"]), int(match["end"]), file) for match, file in named]
    before = run.child(FILE_0_1)
    if before.exists():
        found.append(Part(0, _read_file(before).num_rows, before))
    return found


def _missing(parts: list[Part], first: int) -> list[str]:
    """The numbers of rows from `first` on that no part has: a file was removed."""
    missing = list[str]()
    end = 0
    for part in parts:
        if part.first > max(end, first):
            missing.append(f"{end}-{part.first - 1}")
        end = part.end
    return missing


def _read_parts(
    parts: list[Part], first: int, missing: list[str], run: Location, damaged: Callable[[str], object] | None
) -> pa.Table:
    def tell(error: UserError) -> None:
        if damaged is None:
            raise error
        damaged(f"{error}; the points in it are lost")

    def read_part(part: Part) -> pa.Table:
        try:
            table = _read_file(part.file)
        except UserError as error:
            tell(error)
            return SCHEMA.empty_table()
        return table.slice(max(0, first - part.first))

    if missing:
        tell(UserError(f"{run.child(FOLDER).uri} is damaged: it lacks the rows {', '.join(missing)}"))
    wanted = [part for part in parts if part.end > first]
    with ThreadPoolExecutor(READERS) as pool:
        return pa.concat_tables([SCHEMA.empty_table(), *pool.map(read_part, wanted)])


def _read_file(file: Location) -> pa.Table:
    data = file.read(MAX_BYTES)
    try:
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
        if not table.schema.equals(SCHEMA):
            raise ValueError(f"its columns are {table.schema.names} of {table.schema.types}")
        if any(column.null_count for column in table.columns):
            raise ValueError("a value is missing")
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:  # pyarrow raises them for damage, too
        raise UserError(f"{file.uri} is damaged: {' '.join(str(error).split())[:200]}") from None
    return table


def _to_bytes(table: pa.Table) -> bytes:
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    return stream.getvalue().to_pybytes()
