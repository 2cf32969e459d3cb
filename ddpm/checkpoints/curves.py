"""A run's curves in its own folder, `metrics.parquet`: a copied run can be compared anywhere, without MLflow.

    name: string, images_seen: int64, value: float64 (may be nan), timestamp_ms: int64

One row for each name and position, ascending by position. Rank 0 replaces the file before each checkpoint, so that it
has every point up to the newest one. After a kill it may have later ones too, which the resumed run drops.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ddpm.storage.locations import Location
from ddpm.tracking.metrics_buffer import Metrics, Record
from ddpm.utils.errors import UserError

FILE = "metrics.parquet"
_TYPES: Any = {
    "name": pa.string(),
    "images_seen": pa.int64(),
    "value": pa.float64(),
    "timestamp_ms": pa.int64(),
}
SCHEMA = pa.schema(_TYPES)
MAX_BYTES = 10**8


class Point(NamedTuple):
    """One point of a curve."""

    images_seen: int
    value: float
    timestamp_ms: int


def read(run: Location) -> dict[str, list[Point]]:
    """The curves in a run's folder by name, each ascending; none if there is no such file."""
    curves: dict[str, dict[int, Point]] = {}
    for name, *point in zip(*read_table(run).to_pydict().values(), strict=True):
        curves.setdefault(name, {})[point[0]] = Point(*point)
    return {name: [curve[at] for at in sorted(curve)] for name, curve in sorted(curves.items())}


def read_table(run: Location, until: int | None = None) -> pa.Table:
    """The rows that `read` returns, up to a position; None: all."""
    file = run.child(FILE)
    try:
        data = file.read(MAX_BYTES)
    except FileNotFoundError:
        return SCHEMA.empty_table()
    try:
        table = _parse(data)
        return table if until is None else table.filter(pc.field("images_seen") <= until)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:  # pyarrow raises them for damage, too
        raise UserError(f"{file.uri} is damaged: {' '.join(str(error).split())[:200]}") from None


def _parse(data: bytes) -> pa.Table:
    table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
    if not table.schema.equals(SCHEMA):
        raise ValueError(f"its columns are {table.schema.names} of {table.schema.types}")
    return table


def extended(table: pa.Table, records: Iterable[Record]) -> pa.Table:
    """`table` and the metrics of `records`, which are later."""
    rows = [
        dict(zip(SCHEMA.names, (name, record.images_seen, value, record.timestamp_ms), strict=True))
        for record in records
        if isinstance(record, Metrics)
        for name, value in record.values.items()
    ]
    return pa.concat_tables([table, pa.Table.from_pylist(rows, SCHEMA)])


def to_bytes(table: pa.Table) -> bytes:
    """The content of metrics.parquet."""
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    return stream.getvalue().to_pybytes()
