"""From a source to a data set: one task per shard, the manifest last.

With a cluster, plain Ray tasks write the shards. Each finished shard leaves a note in _prepare/, so the same command
resumes where it was stopped. Without a manifest there is no data set, so a half-written one cannot be read. Nothing
written is ever overwritten, except an unfinished data set of the same command if its source's files have changed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ddpm.data.manifest import (
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    Shard,
    make_manifest,
    read_manifest,
    shard_from_json,
    shard_to_json,
    write_manifest,
)
from ddpm.data.shards import is_intact, read_row_group, write_shard
from ddpm.data.sources import Labels, Pixels, Source
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError
from ddpm.utils.images import grid, png_bytes
from ddpm.utils.retry import answer, as_user_error

NOTES = "_prepare"
OPTIONS = "options.txt"
PREVIEW = "preview.png"
PREVIEW_IMAGES = 64
PREVIEW_ROW_GROUPS = 8

# A row group is read whole: a few megabytes, so that shuffling a window of several takes little memory.
ROW_GROUP_BYTES, MAX_ROWS_PER_ROW_GROUP = 4 << 20, 1024
ROW_GROUPS_PER_SHARD = 16
LARGE_RAW, LARGE_ENCODED = 500_000, 20_000
"""A source with more images is prepared on a cluster: raw images are copied, encoded ones decoded and resized."""
PROBED_IMAGES = 64
LISTED_BYTES = 101
"""Bytes of a row group in the manifest, with its share of the shard's entry (measured, 16 per shard)."""

Sizes = tuple[int | None, int | None]
"""rows_per_shard and rows_per_row_group of `prepare`."""
DEFAULT_SIZES: Sizes = (None, None)


@runtime_checkable
class Checkable(Protocol):
    """A source that can check its files faster than it reads them."""

    def check(self) -> None:
        """Raise UserError if something cannot be read."""


@dataclass(frozen=True)
class _Task:
    """A shard to be written."""

    path: str
    split: str
    start: int
    stop: int
    rows_per_row_group: int


def prepare(
    source: Source,
    location: Location,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_restart: Callable[[], None] | None = None,
    rows_per_shard: int | None = None,
    rows_per_row_group: int | None = None,
    parallel: bool = False,
) -> Manifest:
    """Write the source as a data set at `location`; resume where an earlier call was stopped.

    If the source's files have changed since, all shards are written again.

    Args:
        on_progress: called with the numbers of images written and in total, unless the data set exists already.
        on_restart: called if the source's files have changed since an earlier call.
        rows_per_shard: rounded up to whole row groups; None: 16 of them.
        rows_per_row_group: None: about 4 MB, and at most 1024 images.
        parallel: write shards concurrently as Ray tasks, if Ray is initialised and there are several.

    Returns:
        The manifest; if the same data set exists already, nothing is written.

    Raises:
        UserError: another data set is there, finished or not; the source cannot be read; storage refuses.
    """
    sizes = rows_per_shard, rows_per_row_group
    if there := find(source, location, sizes):
        return there
    if isinstance(source, Checkable):
        source.check()
    options = options_of(source, sizes)
    note = f"{options}\n{_command_of(source, sizes)}\n"
    tasks = _tasks(source, rows_per_shard, rows_per_row_group or _rows_per_row_group(source))
    row_groups = sum(-(-(task.stop - task.start) // task.rows_per_row_group) for task in tasks)
    if row_groups * LISTED_BYTES > MAX_MANIFEST_BYTES:
        raise UserError(
            f"{location.uri}: {row_groups:,} row groups are more than a manifest of {MAX_MANIFEST_BYTES >> 20} MiB "
            "can list; make them larger (rows_per_row_group of ddpm.data.prepare.prepare)"
        )
    with as_user_error(f"cannot write to {location.uri}"):
        if _begin(location, note) and on_restart:
            on_restart()
        for folder in (location, *map(location.child, (NOTES, *source.splits))):
            folder.sweep()
    total, done = sum(task.stop - task.start for task in tasks), 0
    shards: dict[str, Shard] = {}
    try:
        for shard in _run(source, location, tasks, parallel):
            shards[shard.path] = shard
            done += shard.num_rows
            if on_progress:
                on_progress(done, total)
        by_split = {split: [shards[t.path] for t in tasks if t.split == split] for split in source.splits}
        shape = source.height, source.width, source.channels, source.encoding, source.class_names
        manifest = make_manifest(source.name, *shape, by_split, options)
        with suppress(FileNotFoundError):  # another process has finished the same data set
            if _options_note(location).read().decode(errors="replace") != note:
                raise UserError(
                    f"{location.uri}: another process has started this data set over; this one stops"
                )
        write_manifest(location, manifest)
    except OSError as error:
        if there := find(source, location, sizes):  # another process has written it
            _forget(location)
            return there
        raise UserError(
            f"{location.uri} is not finished: {answer(error)}; run the same command again to continue"
        ) from None
    _forget(location)
    return manifest


def find(source: Source, location: Location, sizes: Sizes = DEFAULT_SIZES) -> Manifest | None:
    """The data set that `prepare` would make, if it is there already.

    Raises:
        UserError: another data set is there, or storage refuses.
    """
    with as_user_error(f"cannot look for a data set at {location.uri}"):
        if not location.child(MANIFEST).exists():
            return None
    manifest = read_manifest(location)
    if manifest.options != options_of(source, sizes):
        raise UserError(
            f"{location.uri} holds another data set, of source {manifest.source!r} or made with other options; "
            "choose another place, or remove that one first"
        )
    return manifest


def is_large(source: Source) -> bool:
    """Whether preparing `source` is worth the seconds that a cluster takes to start."""
    return sum(source.splits.values()) > (LARGE_RAW if source.encoding == "raw" else LARGE_ENCODED)


def write_preview(location: Location, manifest: Manifest) -> Location:
    """Write a grid of 64 images spread over the data set; return its location.

    Raises:
        UserError: storage refuses.
    """
    split = "train" if "train" in manifest.splits else next(iter(manifest.splits))
    groups = [rows for shard in manifest.splits[split].shards for rows in shard.row_groups]
    chosen = np.unique(np.linspace(0, len(groups) - 1, PREVIEW_ROW_GROUPS).astype(int)).tolist()
    share = -(-PREVIEW_IMAGES // len(chosen))
    pixels = []
    with as_user_error("the data set is complete, but its preview cannot be written"):
        for group in chosen:
            rows = np.unique(np.linspace(0, groups[group] - 1, share).astype(np.int64))
            pixels.append(read_row_group(location, manifest, split, group, rows)[0])
        sheet = grid(np.concatenate(pixels)[:PREVIEW_IMAGES])
        preview = location.child(PREVIEW)
        preview.write(png_bytes(sheet), durable=True)
    return preview


def options_of(source: Source, sizes: Sizes = DEFAULT_SIZES) -> str:
    """Hash of everything that decides the bytes of the data set."""
    return _hash(FORMAT, source.identity(), source.splits, *sizes)


def _command_of(source: Source, sizes: Sizes) -> str:
    """Hash of the command's options, independent of the source's current files."""
    asked = {key: value for key, value in source.identity().items() if key not in ("files", "splits")}
    return _hash(FORMAT, asked, *sizes)


def _hash(*identity: object) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _begin(location: Location, note: str) -> bool:
    """Record what is being prepared: hashes of the options and of the command, one per line.

    Returns:
        Whether an earlier call of the same command found other files, so that all is written again.

    Raises:
        UserError: another data set is being prepared there.
        OSError: storage does not answer.
    """
    place = _options_note(location)
    if not place.exists():
        place.write(note.encode())
        return False
    begun = place.read().decode(errors="replace")
    if begun == note:
        return False
    if begun.splitlines()[1:] != note.splitlines()[1:]:
        raise UserError(
            f"{location.uri} holds an unfinished data set of another source or with other options; choose another "
            "place, or remove that folder first"
        )
    _remove_shards(location)
    place.write(note.encode())
    return True


def _remove_shards(location: Location) -> None:
    """Remove the shards that an earlier call finished, and their notes; nothing else."""
    for name in location.child(NOTES).files():
        if not name.endswith(".json"):
            continue
        note = location.child(NOTES).child(name)
        with suppress(UserError, FileNotFoundError):  # a damaged note names no shard
            location.child(shard_from_json(note.read(), note.uri).path).unlink()
        location.filesystem.delete_file(note.path)


def _forget(location: Location) -> None:
    """Remove the notes of a data set that is finished."""
    with suppress(OSError):  # another process may write the same notes, and then removes them
        location.child(NOTES).delete()


def _rows_per_row_group(source: Source) -> int:
    if source.encoding == "raw":
        size = source.height * source.width * source.channels
    else:
        split, rows = next(iter(source.splits.items()))
        probe, _ = source.read(split, 0, min(rows, PROBED_IMAGES))
        size = sum(map(len, probe)) // len(probe)
    return max(1, min(MAX_ROWS_PER_ROW_GROUP, ROW_GROUP_BYTES // max(1, size)))


def _tasks(source: Source, rows_per_shard: int | None, rows_per_row_group: int) -> list[_Task]:
    whole = -(-rows_per_shard // rows_per_row_group) if rows_per_shard else ROW_GROUPS_PER_SHARD
    rows_per_shard = whole * rows_per_row_group  # so that only the last row group of a split is smaller
    return [
        _Task(f"{split}/{i:05d}.parquet", split, start, min(start + rows_per_shard, rows), rows_per_row_group)
        for split, rows in source.splits.items()
        for i, start in enumerate(range(0, rows, rows_per_shard))
    ]


def _run(source: Source, location: Location, tasks: list[_Task], parallel: bool) -> Iterator[Shard]:
    """The shards of all tasks, as they are finished."""
    if parallel and len(tasks) > 1:
        import ray

        if ray.is_initialized():
            yield from _run_on_ray(source, location, tasks)
            return
    yield from (_make(source, location, task) for task in tasks)


def _run_on_ray(source: Source, location: Location, tasks: list[_Task]) -> Iterator[Shard]:
    import ray

    make, shared = ray.remote(_make), ray.put(source)
    pending = [make.remote(shared, location, task) for task in tasks]
    try:
        while pending:
            (finished,), pending = ray.wait(pending)
            yield ray.get(finished)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | OSError):  # without the worker's traceback
            raise error.cause from None
        raise
    finally:
        for task in pending:
            ray.cancel(task)


def _make(source: Source, location: Location, task: _Task) -> Shard:
    """Write a shard and its note, unless both exist."""
    if shard := kept_shard(location, task.path):
        return shard
    images, labels = source.read(task.split, task.start, task.stop)
    return keep_shard(location, task.path, images, labels, task.rows_per_row_group)


def kept_shard(location: Location, path: str) -> Shard | None:
    """The shard `path` of an earlier call, if it is there byte for byte; else None.

    Raises:
        OSError: storage does not answer.
    """
    note = _note(location, path)
    if note.exists():
        with suppress(UserError):  # ignore a damaged note
            shard = shard_from_json(note.read(), note.uri)
            if shard.path == path and is_intact(location, shard):
                return shard
    return None


def keep_shard(
    location: Location,
    path: str,
    images: Pixels | Sequence[bytes],
    labels: Labels | None,
    rows_per_row_group: int,
) -> Shard:
    """Write a shard, and its note for `kept_shard`.

    Raises:
        OSError: storage does not answer.
    """
    shard = write_shard(location, path, images, labels, rows_per_row_group=rows_per_row_group)
    _note(location, path).write(shard_to_json(shard).encode())
    return shard


def _note(location: Location, path: str) -> Location:
    return location.child(NOTES).child(f"{path.replace('/', '-')}.json")


def _options_note(location: Location) -> Location:
    return location.child(NOTES).child(OPTIONS)
