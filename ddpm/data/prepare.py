"""From a source to a data set: one task per shard, the manifest last.

On a cluster, Ray tasks write the shards. The same command resumes where it was stopped: finished shards are kept. A
folder without a manifest is not a data set, so an unfinished one cannot be read. One process at a time prepares a data
set; others wait. No file is overwritten. One hash, `options_of`, says which data set it is: of the source's options and
the contents of its files, and of how it is written.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm.data import duplicates
from ddpm.data.manifest import (
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_ROW_GROUP_BYTES,
    Manifest,
    Shard,
    make_manifest,
    read_manifest,
    write_manifest,
)
from ddpm.data.row_group import Labels, Pixels
from ddpm.data.shards import kept_shard, write_shard
from ddpm.data.sources.image_folder import ImageFiles
from ddpm.data.sources.sources import MAX_EXAMINED, Source, UnreadableImages
from ddpm.runs.lock import DriverLock
from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError
from ddpm.utils.images import grid, png_bytes
from ddpm.utils.progress import printable, shortened, track
from ddpm.utils.retry import as_user_error

log = logging.getLogger(__name__)

NOTES = "_prepare"
OPTIONS = "options.txt"
PREVIEW = "preview.png"
PREVIEW_IMAGES = 64
UNREADABLE = "unreadable.txt"
"""File of a data set that lists the images that could not be read."""
MAX_UNREADABLE_SHARE = 0.05
SKIP = "--skip-unreadable (--data.skip-unreadable in training)"
NUM_NAMED = 3
"""Unreadable images that an error names."""
MAX_NAMED_LENGTH = 115
"""Characters of each of them."""

# A row group is read whole: a few megabytes, so that shuffling a window of several takes little memory.
ROW_GROUP_BYTES = 4 << 20
MAX_ROWS_PER_ROW_GROUP = 1024
ROW_GROUPS_PER_SHARD = 16

# A source with more images than this is prepared on a cluster. Raw images are copied, encoded ones decoded and resized.
LARGE_RAW = 500_000
LARGE_ENCODED = 20_000
PROBED_IMAGES = 64
LISTED_BYTES = 101
"""Bytes of a row group in the manifest, with its share of the shard's entry (measured, 16 per shard)."""


@dataclass(frozen=True)
class _Task:
    """A shard to be written."""

    path: str
    split: str
    start: int
    stop: int
    rows_per_row_group: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


class _Written(NamedTuple):
    """The result of a task."""

    shard: Shard | None
    """None: it has not been written."""
    reasons: Sequence[str]
    """"file: reason" of each image that cannot be read."""


def prepare(
    source: Source,
    location: Location,
    description: str = "preparing",
    *,
    connect: Callable[[], object] | None = None,
    rows_per_row_group: int | None = None,
    skip_unreadable: bool = False,
    drop_duplicates: bool = False,
) -> Manifest:
    """Write the source as a data set at `location`, unless it is there; resume where an earlier call was stopped.

    While another process prepares a data set there, this one waits. If images cannot be read, nothing is left but their
    list; if they change meanwhile, nothing is left.

    Args:
        description: beside the progress.
        connect: starts Ray, so that shards are written in parallel; called only if there is something to do.
        rows_per_row_group: None: about 4 MB, and at most 1024 images.
        skip_unreadable: leave out up to 5 % of the images if they cannot be read; unreadable.txt lists them.
        drop_duplicates: leave out near-duplicates; duplicates.txt lists them.
    """
    num_images = sum(source.splits.values())
    if drop_duplicates and num_images > MAX_EXAMINED:
        raise UserError(
            f"--drop-duplicates searches at most {MAX_EXAMINED:,} images, and there are {num_images:,}"
        )
    options = options_of(source, rows_per_row_group, drop_duplicates)
    manifest = find(location, options)
    if manifest is not None:
        return manifest
    if location.is_local:
        check_outside(source, Path(location.path))
    tasks = _tasks(source, location, rows_per_row_group or _rows_per_row_group(source))
    if connect is not None:
        connect()
    with DriverLock(location, "data set", "URI", log.warning, waits=True) as lock:
        # Another process may have made it meanwhile.
        manifest = find(location, options)
        if manifest is not None:
            return manifest
        begin(source.splits, location, options)
        with as_user_error(f"{location.uri} is not finished; run the same command again to continue"):
            results: Iterator[tuple[_Task, _Written]]
            if connect is None or len(tasks) == 1:
                results = ((task, _write(source, location, task, skip_unreadable)) for task in tasks)
            else:
                results = _write_on_ray(source, location, tasks, skip_unreadable)
            written = dict(track(description, num_images, results, lambda result: result[0].num_rows))
            lock.check()
            try:
                is_unchanged = options_of(source, rows_per_row_group, drop_duplicates) == options
            except UserError:  # a file is gone
                is_unchanged = False
            if not is_unchanged:
                _remove(source, location)
                raise UserError("images changed while they were read; run the same command again")
            _check_unreadable(source, location, written, skip_unreadable)
            return _finish(source, location, written, options, drop_duplicates)


def options_of(source: Source, rows_per_row_group: int | None = None, drop_duplicates: bool = False) -> str:
    """Hash of everything that decides the bytes of the data set, as the source's files are now."""
    threshold = duplicates.THRESHOLD if drop_duplicates else None
    options = [FORMAT, source.identity(), source.splits, rows_per_row_group, threshold]
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()


def find(location: Location, options: str) -> Manifest | None:
    """The data set at `location`, if it is there already; UserError if it is one of other `options_of`."""
    with as_user_error(f"cannot look for a data set at {location.uri}"):
        if not location.child(MANIFEST).exists():
            return None
    manifest = read_manifest(location)
    if manifest.options != options:
        raise UserError(
            f"{location.uri} holds another data set, of source {manifest.source!r} or made with other options; "
            "choose another folder, or remove that one first"
        )
    return manifest


def check_outside(source: Source, written: Path) -> None:
    """Raise UserError if `written`, to which files are written, lies in the folder of the source's images."""
    if isinstance(source, ImageFiles) and written.resolve().is_relative_to(source.path.resolve()):
        raise UserError(
            f"{written} is in {source.path}, so what is written there would be among its images; name another folder "
            "(in training: --run.storage), or start the command in another one"
        )


def is_large(source: Source) -> bool:
    """Whether preparing `source` is worth the seconds that a cluster takes to start."""
    limit = LARGE_RAW if source.encoding == "raw" else LARGE_ENCODED
    return sum(source.splits.values()) > limit


def left_out(location: Location) -> str | None:
    """A line for the user on the images of a data set that could not be read; None: all could."""
    listed = location.child(UNREADABLE)
    with as_user_error(f"cannot read {listed.uri}"):
        if not listed.exists():
            return None
        count = len(listed.read(MAX_MANIFEST_BYTES).splitlines())
    images = "1 image" if count == 1 else f"{count:,} images"
    return f"left out    {images} that cannot be read, listed in {listed.uri}"


def write_preview(location: Location, manifest: Manifest) -> Location:
    """Write a grid of 64 images spread over the data set, unless it is there; return its location."""
    split = "train" if "train" in manifest.splits else next(iter(manifest.splits))
    with as_user_error("the data set is complete, but its preview cannot be written"):
        preview = location.child(PREVIEW)
        if preview.exists():
            return preview
        rows = np.linspace(0, manifest.splits[split].num_rows - 1, PREVIEW_IMAGES).astype(int)
        sheet = grid(duplicates.images_at(location, manifest, [(split, i) for i in np.unique(rows).tolist()]))
        preview.write(png_bytes(sheet), durable=True)
    return preview


def begin(splits: Iterable[str], location: Location, options: str) -> None:
    """Note what is being prepared, so that each shard at `location` is of these options; refuse shards of others."""
    with as_user_error(f"cannot write to {location.uri}"):
        note = location.child(NOTES).child(OPTIONS)
        if note.exists():
            if note.read().decode(errors="replace") != options:
                raise UserError(
                    f"{location.uri} holds an unfinished data set of another source, with other options or of files "
                    "that have changed; choose another folder, or remove that one first"
                )
        else:
            shards = _shards_at(splits, location)
            if shards:
                raise UserError(
                    f"{shards[0].uri} is there already, without a manifest; choose another folder, or remove it first"
                )
            note.write(options.encode())
        for name in (UNREADABLE, duplicates.LISTED, duplicates.PICTURE, PREVIEW):
            location.child(name).unlink()  # of an earlier call, or of a data set that was removed
        location.sweep()
        for name in (NOTES, *splits):
            location.child(name).sweep()


def _shards_at(splits: Iterable[str], location: Location) -> list[Location]:
    """The files there that have names of shards."""
    folders = [location.child(split) for split in splits]
    return [
        folder.child(name)
        for folder in folders
        for name in folder.files()
        if re.fullmatch(r"[0-9]{5,9}\.parquet", name)
    ]


def _remove(source: Source, location: Location) -> None:
    """Remove an unfinished data set."""
    for shard in _shards_at(source.splits, location):
        shard.unlink()
    for split in source.splits:
        location.child(split).delete_if_empty()
    location.child(NOTES).delete()


def _check_unreadable(source: Source, location: Location, written: dict[_Task, _Written], skip: bool) -> None:
    """List the images that cannot be read; unless they may be skipped, remove all else, and raise UserError."""
    unreadable = dict.fromkeys(source.splits, 0)
    lines = []
    for task, result in written.items():
        unreadable[task.split] += len(result.reasons)
        lines += [printable(reason) for reason in result.reasons]
    lines.sort()
    if not lines:
        return
    listed = location.child(UNREADABLE)
    listed.write("".join(f"{line}\n" for line in lines).encode(), durable=True)
    count = len(lines)
    total = sum(source.splits.values())
    splits_are_left = all(unreadable[split] < size for split, size in source.splits.items())
    may_skip = count <= MAX_UNREADABLE_SHARE * total and splits_are_left
    if skip and may_skip:
        return
    _remove(source, location)
    if may_skip:
        advice = f"repair or remove them, or leave them out with {SKIP}"
    else:
        limit = f"{MAX_UNREADABLE_SHARE:.0%} at most, and no whole split"
        advice = f"repair or remove them, since {SKIP} leaves out {limit}"
    named = "; ".join(shortened(line, MAX_NAMED_LENGTH) for line in lines[:NUM_NAMED])
    if count > NUM_NAMED:
        named += "; ..."
    raise UserError(
        f"{count:,} of {total:,} images cannot be read ({listed.uri} lists all); {advice}: {named}"
    )


def _rows_per_row_group(source: Source) -> int:
    decoded = source.height * source.width * source.channels
    stored = decoded
    if source.encoding == "encoded":
        split, num_rows = next(iter(source.splits.items()))
        probe, _, _ = _read(source, split, 0, min(num_rows, PROBED_IMAGES))
        stored = sum(map(len, probe)) // max(1, len(probe))
    rows = min(MAX_ROWS_PER_ROW_GROUP, ROW_GROUP_BYTES // max(1, stored), MAX_ROW_GROUP_BYTES // decoded)
    return max(1, rows)


def _read(
    source: Source, split: str, start: int, stop: int
) -> tuple[Pixels | Sequence[bytes], Labels | None, tuple[str, ...]]:
    """Images [start, stop) of the split that can be read, their labels, and "file: reason" of the others."""
    try:
        return *source.read(split, start, stop), ()
    except UnreadableImages as error:
        return error.images, error.labels, tuple(error.reasons)


def _tasks(source: Source, location: Location, rows_per_row_group: int) -> list[_Task]:
    row_groups = sum(math.ceil(rows / rows_per_row_group) for rows in source.splits.values())
    if row_groups * LISTED_BYTES > MAX_MANIFEST_BYTES:
        raise UserError(
            f"{location.uri}: {row_groups:,} row groups are more than a manifest of {MAX_MANIFEST_BYTES >> 20} MiB "
            "can list; make them larger (rows_per_row_group of ddpm.data.prepare.prepare)"
        )
    rows_per_shard = ROW_GROUPS_PER_SHARD * rows_per_row_group
    tasks = []
    for split, rows in source.splits.items():
        for i, start in enumerate(range(0, rows, rows_per_shard)):
            stop = min(start + rows_per_shard, rows)
            tasks.append(_Task(f"{split}/{i:05d}.parquet", split, start, stop, rows_per_row_group))
    return tasks


def _finish(
    source: Source, location: Location, written: dict[_Task, _Written], options: str, drop: bool
) -> Manifest:
    """Write the manifest of the shards that were written; if `drop`, write them without near-duplicates first."""
    shards: dict[str, list[Shard]] = {split: [] for split in source.splits}
    for task in sorted(written, key=lambda task: task.start):
        shard = written[task].shard
        if shard is not None:
            shards[task.split].append(shard)
    shape = (source.height, source.width, source.channels)
    manifest = make_manifest(source.name, shape, source.encoding, source.class_names, shards, options)
    if drop:
        dropped = {pair.row for pair in duplicates.write(source, location, manifest)}
        shards = {split: duplicates.drop(location, split, parts, dropped) for split, parts in shards.items()}
        manifest = make_manifest(source.name, shape, source.encoding, source.class_names, shards, options)
    write_manifest(location, manifest)
    location.child(NOTES).delete()
    return manifest


def _write_on_ray(
    source: Source, location: Location, tasks: list[_Task], skip: bool
) -> Iterator[tuple[_Task, _Written]]:
    """Write shards in Ray tasks, and yield their results as they finish."""
    import ray

    write = ray.remote(_write)
    shared = ray.put(source)
    pending = {write.remote(shared, location, task, skip): task for task in tasks}
    try:
        while pending:
            finished, _ = ray.wait(list(pending))
            for reference in finished:
                yield pending.pop(reference), ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | OSError):  # without the worker's traceback
            raise error.cause from None
        raise
    finally:
        for reference in pending:
            ray.cancel(reference)


def _write(source: Source, location: Location, task: _Task, skip: bool) -> _Written:
    """Write a shard, unless it is kept, or has images that cannot be read and must not be skipped."""
    shard = kept_shard(location, task.path, task.num_rows)
    if shard is not None:
        return _Written(shard, ())
    images, labels, reasons = _read(source, task.split, task.start, task.stop)
    if reasons and not (skip and len(images)):
        return _Written(None, reasons)
    shard = write_shard(location, task.path, images, labels, rows_per_row_group=task.rows_per_row_group)
    return _Written(shard, reasons)
