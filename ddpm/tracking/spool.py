"""The spool: segments of records in a run's storage, until they are delivered.

A worker writes a segment before the checkpoint that follows it. Once that checkpoint is committed, the segment is
final: no restart of the run takes it back. Segments beyond the newest checkpoint wait, since a restart may discard
them, except for the last segment of a run that failed.

Functions raise OSError when storage does not answer.
"""

import pyarrow.fs as pafs

from ddpm.storage.locations import Location
from ddpm.tracking import metrics_buffer
from ddpm.tracking.metrics_buffer import DamagedSegment

FOLDER = "tracking"
"""Folder of a run that holds its segments."""


def final(buffer: Location, committed: int) -> list[Location]:
    """The segments that may be delivered when the newest checkpoint is at `committed`, in order of delivery."""
    return [file for at, failed, file in _segments(buffer) if failed or at <= committed]


def discard_after(buffer: Location, images_seen: int) -> None:
    """Delete the segments beyond `images_seen`, from which the run resumes."""
    for at, failed, file in _segments(buffer):
        if at > images_seen and not failed:
            file.unlink()


def count(buffer: Location, committed: int) -> int:
    """Number of final records that are not delivered yet; a damaged segment counts as one."""
    total = 0
    for file in final(buffer, committed):
        try:
            with file.filesystem.open_input_file(file.path) as stream:
                total += metrics_buffer.count(stream, file.uri)  # type: ignore[arg-type]
        except FileNotFoundError:
            continue
        except DamagedSegment:
            total += 1
    return total


def _segments(buffer: Location) -> list[tuple[int, bool, Location]]:
    infos = buffer.filesystem.get_file_info(pafs.FileSelector(buffer.path, allow_not_found=True))
    names = sorted(info.base_name for info in infos if info.type == pafs.FileType.File)
    parsed = [(metrics_buffer.parse_name(name), buffer.child(name)) for name in names]
    return [(*position, file) for position, file in parsed if position is not None]
