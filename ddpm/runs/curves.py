"""A run's curves in its own folder: a copied run can be compared anywhere, and sent to any MLflow.

    metrics/000000000-000000350-g1.parquet  metrics/000000350-000000420-g2.parquet  ...

    name: string, images_seen: int64, value: float64 (may be nan), timestamp_ms: int64

The parts are one table, in the order in which its rows were recorded; a part's name has the numbers of its first row
and of the row after its last one, and its generation (generations.py), which says how many of its rows count. Rank 0
writes a part before each checkpoint. A row is final: a value of the same name and position that is measured again,
after a crash, is not recorded again (training/store.py).

`merge` replaces all parts by one. If it is killed before it has removed them, they lie inside the rows of the merged
part, are ignored, and go with the next merge.
"""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ddpm.runs import generations
from ddpm.runs.generations import Generations
from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError

FOLDER = "metrics"
PART = re.compile(rf"(?P<first>\d{{9,}})-(?P<end>\d{{9,}}){generations.SUFFIX.pattern}\.parquet")
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
    """The rows `first` to `end` - 1 of the curves, in a file that may begin earlier and end later."""

    first: int
    end: int
    begins_at: int
    """The number of the file's first row."""
    generation: int
    file: Location


def read(run: Location) -> dict[str, list[Point]]:
    """The curves in a run's folder by name, each ascending."""
    curves: dict[str, dict[int, Point]] = {}
    for row in to_rows(read_rows(run)):
        point = Point(row.images_seen, row.value, row.timestamp_ms)
        curves.setdefault(row.name, {}).setdefault(row.images_seen, point)
    return {name: [curve[at] for at in sorted(curve)] for name, curve in sorted(curves.items())}


def read_rows(run: Location, first: int = 0, damaged: Callable[[str], object] | None = None) -> pa.Table:
    """The final rows from number `first` on, in the order in which they were recorded.

    Args:
        damaged: called with a line for each damaged part, whose rows are left out; None: such a part raises UserError.
    """
    for tries_left in reversed(range(TRIES)):
        found = generations.read(run)
        parts = _parts(run, found, found.num_final)
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
    """The number of final rows."""
    found = generations.read(run)
    return max((part.end for part in _parts(run, found, found.num_final)), default=0)


def num_stored(run: Location, found: Generations) -> int:
    """The number of rows, final or not, from which the next generation can continue."""
    return max((part.end for part in _parts(run, found)), default=0)


def part(first: int, rows: list[CurveRow], generation: int) -> tuple[str, bytes]:
    """Name in the run's folder and content of a part with `rows`, the first of which has the number `first`."""
    table = pa.Table.from_pylist([row._asdict() for row in rows], schema=SCHEMA)
    return _name(first, first + len(rows), generation), _to_bytes(table)


def merge(run: Location, generation: int, damaged: Callable[[str], object]) -> pa.Table:
    """Replace all parts by one of this generation, the newest, and return the rows.

    A damaged part is left out, with a line to `damaged`; then nothing is replaced.
    """
    files = [file for file in _files(run) if file.generation <= generation]
    lost = list[str]()
    table = read_rows(run, 0, lost.append)
    for line in lost:
        damaged(line)
    if len(files) > 1 and not lost:
        whole = run.child(_name(0, table.num_rows, generation))
        whole.create(_to_bytes(table), durable=True)
        for old in files:
            if old.file.path != whole.path:
                old.file.unlink()
    return table


def _name(first: int, end: int, generation: int) -> str:
    return f"{FOLDER}/{first:09d}-{end:09d}{generations.suffix(generation)}.parquet"


def _parts(run: Location, found: Generations, limit: float = float("inf")) -> list[Part]:
    """The parts that count, up to the row `limit`, ascending and disjoint.

    What a generation merged has the rows of those before it, so where parts overlap they are the same.
    """
    counting = list[Part]()
    for file in _files(run):
        end = int(min(file.end, found.last_row(file.generation), limit))
        counting.append(file._replace(end=end))
    parts = list[Part]()
    covered = 0
    for part in sorted(counting, key=lambda part: (part.first, -part.end)):
        if part.end > max(covered, part.first):
            parts.append(part._replace(first=max(covered, part.first)))
            covered = part.end
    return parts


def _files(run: Location) -> list[Part]:
    """All parts, with those that a killed merge has left and those that do not count."""
    folder = run.child(FOLDER)
    found = list[Part]()
    for name in folder.files():
        if match := PART.fullmatch(name):
            first = int(match["first"])
            end = int(match["end"])
            found.append(Part(first, end, first, int(match["generation"]), folder.child(name)))
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
        begin = max(first, part.first)
        return table.slice(begin - part.begins_at, part.end - begin)

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
