"""From a source to a data set: one task per shard, the manifest last.

On a cluster, Ray tasks write the shards. The same command resumes where it was stopped: finished shards are kept. A
folder without a manifest is not a data set, so an unfinished one cannot be read. One process at a time prepares a data
set; others wait. No file is overwritten, except those of an unfinished data set of the same command if its source's
files have changed.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
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
from ddpm.data.sources.sources import MAX_EXAMINED, Source, UnreadableImages, earlier
from ddpm.runs.lock import DriverLock
from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError
from ddpm.utils.images import grid, png_bytes
from ddpm.utils.progress import Display, printable, shortened
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
    """Write the source as a data set at `location`, and show it; resume where an earlier call was stopped.

    If the source's files have changed since, all shards are written again. While another process prepares a data set
    there, this one waits. If images cannot be read, nothing is left but their list.

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
    manifest = find(source, location, rows_per_row_group, drop_duplicates)
    if manifest is None:
        if location.is_local:
            check_outside(source, Path(location.path))
        tasks = _tasks(source, location, rows_per_row_group or _rows_per_row_group(source))
        if connect is not None:
            connect()
        results: Iterator[tuple[_Task, _Written]]
        if connect is None or len(tasks) == 1:
            results = ((task, _write(source, location, task, skip_unreadable)) for task in tasks)
        else:
            results = _write_on_ray(source, location, tasks, skip_unreadable)
        with DriverLock(location, "data set", "URI", log.warning, waits=True) as lock:
            # Another process may have made it meanwhile.
            manifest = find(source, location, rows_per_row_group, drop_duplicates)
            if manifest is None:
                options = _begin(source, location, rows_per_row_group, drop_duplicates)
                with as_user_error(f"{location.uri} is not finished; run the same command again to continue"):
                    written = _collect(results, description, num_images)
                    lock.check()
                    _check_unreadable(source, location, written, skip_unreadable)
                    manifest = _finish(source, location, written, options, drop_duplicates)
    listed = location.child(UNREADABLE)
    with as_user_error(f"cannot read {listed.uri}"):
        count = len(listed.read(MAX_MANIFEST_BYTES).splitlines()) if listed.exists() else 0
    if count:
        images = "1 image" if count == 1 else f"{count:,} images"
        print(f"left out    {images} that cannot be read, listed in {listed.uri}", flush=True)
    return manifest


def check_outside(source: Source, written: Path) -> None:
    """Raise UserError if `written`, to which files are written, lies in the folder of the source's images."""
    if isinstance(source, ImageFiles) and written.resolve().is_relative_to(source.path.resolve()):
        raise UserError(
            f"{written} is in {source.path}, so what is written there would be among its images; name another folder "
            "(in training: --run.storage), or start the command in another one"
        )


def find(source: Source, location: Location, rows: int | None = None, drop: bool = False) -> Manifest | None:
    """The data set that `prepare` would make, if it is there already."""
    with as_user_error(f"cannot look for a data set at {location.uri}"):
        if not location.child(MANIFEST).exists():
            return None
    manifest = read_manifest(location)
    if manifest.options != options_of(source, rows, drop):
        raise UserError(
            f"{location.uri} holds another data set, of source {manifest.source!r} or made with other options; "
            "choose another folder, or remove that one first"
        )
    return manifest


def as_prepared(source: Source, location: Location, drop: bool = False) -> Source:
    """`source` with an earlier version's split, if the data set at `location` was made with it; else `source`."""
    before = earlier(source)
    if before is not None:
        with as_user_error(f"cannot look for a data set at {location.uri}"):
            is_there = location.child(MANIFEST).exists()
        if is_there and read_manifest(location).options == options_of(before, drop=drop):
            return before
    return source


def is_large(source: Source) -> bool:
    """Whether preparing `source` is worth the seconds that a cluster takes to start."""
    limit = LARGE_RAW if source.encoding == "raw" else LARGE_ENCODED
    return sum(source.splits.values()) > limit


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


def options_of(source: Source, rows: int | None = None, drop: bool = False) -> str:
    """Hash of everything that decides the bytes of the data set."""
    # None stands for an option of earlier versions, whose data sets are found by the same hash.
    asked: list[object] = [FORMAT, source.identity(), source.splits, None, rows]
    if drop:
        asked.append(duplicates.THRESHOLD)
    return _hash(asked)


def _hash_of_command(source: Source, rows: int | None, drop: bool) -> str:
    """Hash of the options of a command, without the current files of its source."""
    given = {key: value for key, value in source.identity().items() if key not in ("files", "splits")}
    asked: list[object] = [FORMAT, given, None, rows]
    if drop:
        asked.append(True)
    return _hash(asked)


def _hash(values: list[object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _begin(source: Source, location: Location, rows_per_row_group: int | None, drop_duplicates: bool) -> str:
    """Record what is being prepared: hashes of the options and of the command, one per line; return the first.

    Afterwards every shard at `location` is of this call, or of an earlier one with the same note. If an earlier call of
    the same command found other files, its shards are removed.
    """
    options = options_of(source, rows_per_row_group, drop_duplicates)
    note = f"{options}\n{_hash_of_command(source, rows_per_row_group, drop_duplicates)}\n"
    with as_user_error(f"cannot write to {location.uri}"):
        file = location.child(NOTES).child(OPTIONS)
        shards = _shards_at(source, location)
        earlier = file.read().decode(errors="replace") if file.exists() else None
        if earlier is None and shards:
            raise UserError(
                f"{shards[0].uri} is there already, without a manifest; choose another folder, or remove it first"
            )
        if earlier is not None and earlier.splitlines()[1:] != note.splitlines()[1:]:
            raise UserError(
                f"{location.uri} holds an unfinished data set of another source or with other options; choose "
                "another folder, or remove that one first"
            )
        if earlier not in (None, note):
            log.warning(
                "%s: the source's files have changed since preparation began; it starts over", location.uri
            )
            for shard in shards:
                shard.unlink()
        if earlier != note:
            file.write(note.encode())
        for name in (duplicates.LISTED, duplicates.PICTURE, PREVIEW):
            location.child(name).unlink()  # of a data set that was removed
        location.sweep()
        for name in (NOTES, *source.splits):
            location.child(name).sweep()
    return options


def _shards_at(source: Source, location: Location) -> list[Location]:
    """The files there that have names of shards."""
    folders = [location.child(split) for split in source.splits]
    return [
        folder.child(name)
        for folder in folders
        for name in folder.files()
        if re.fullmatch(r"[0-9]{5,9}\.parquet", name)
    ]


def _check_unreadable(source: Source, location: Location, written: dict[_Task, _Written], skip: bool) -> None:
    """List the images that cannot be read; unless they may be skipped, remove all else, and raise UserError."""
    unreadable = dict.fromkeys(source.splits, 0)
    lines = []
    for task, result in written.items():
        unreadable[task.split] += len(result.reasons)
        lines += [printable(reason) for reason in result.reasons]
    lines.sort()
    listed = location.child(UNREADABLE)
    if not lines:
        listed.unlink()  # it is of an earlier call
        return
    listed.write("".join(f"{line}\n" for line in lines).encode(), durable=True)
    count = len(lines)
    total = sum(source.splits.values())
    splits_are_left = all(unreadable[split] < size for split, size in source.splits.items())
    may_skip = count <= MAX_UNREADABLE_SHARE * total and splits_are_left
    if skip and may_skip:
        return
    for shard in _shards_at(source, location):
        shard.unlink()
    for split in source.splits:
        location.child(split).delete_if_empty()
    location.child(NOTES).delete()
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


def _collect(
    results: Iterator[tuple[_Task, _Written]], description: str, num_images: int
) -> dict[_Task, _Written]:
    """Wait for all results, and show how many images are done."""
    written = {}
    done = 0
    with Display(description, num_images) as display:
        for task, result in results:
            written[task] = result
            done += task.stop - task.start
            display.update(done)
    return written


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
    shard = kept_shard(location, task.path, task.stop - task.start)
    if shard is not None:
        return _Written(shard, ())
    images, labels, reasons = _read(source, task.split, task.start, task.stop)
    if reasons and not (skip and len(images)):
        return _Written(None, reasons)
    shard = write_shard(location, task.path, images, labels, rows_per_row_group=task.rows_per_row_group)
    return _Written(shard, reasons)
