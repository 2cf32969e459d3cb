"""Near-duplicates in a data set: images that look like another one of the same split, or of another (a leak).

Two images look alike if the root mean square of the differences of their thumbnails, of SIDE x SIDE pixels, is at most
THRESHOLD grey levels; one of them may be mirrored. docs/recipes/reading.md says what this finds, and what it does not.

Axes: N images, H W, C channels.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from ddpm.data.manifest import Manifest, Shard
from ddpm.data.row_group import Pixels, columns
from ddpm.data.shards import read_row_group, write_shard
from ddpm.data.sources.sources import MAX_EXAMINED
from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError
from ddpm.utils.images import grid, png_bytes
from ddpm.utils.progress import printable, track
from ddpm.utils.retry import as_user_error

LISTED = "duplicates.txt"
PICTURE = "duplicates.png"
MAX_PICTURED = 64
"""Pairs in the picture."""
PICTURE_COLUMNS = 16
SIDE = 8
THRESHOLD = 2.5
COMPONENTS = 16
"""Principal components of the thumbnails, in which they are searched."""
RowKey = tuple[str, int]
"""An image: its split, and its position there."""


class Duplicate(NamedTuple):
    """An image that looks like an earlier one; the images of "train" come last."""

    in_one_split: bool
    distance: float
    row: RowKey
    like: RowKey
    is_mirrored: bool


def find(location: Location, manifest: Manifest, shows_progress: bool = True) -> list[Duplicate]:
    """The images that look like an earlier one: those of two splits first, then the nearest.

    Of the others, no two of a split look alike, and none of "train" looks like any held-out image.
    """
    from scipy.spatial import KDTree  # takes a second to import

    splits = sorted(manifest.splits, key=lambda split: (split == "train", split))
    rows = [(split, i) for split in splits for i in range(manifest.splits[split].num_rows)]
    split_of = np.array([splits.index(split) for split, _ in rows])
    thumbnails = _thumbnails(location, manifest, splits, shows_progress)
    # Candidates are the neighbours in a projection, which lengthens no distance, so no pair is lost. Which of them are
    # near is then decided by integers.
    values = thumbnails.reshape(len(rows), -1).astype(np.float32)
    mean = values.mean(0)
    values -= mean
    axes = np.linalg.eigh(values.T @ values)[1][:, -COMPONENTS:]
    tree = KDTree(values @ axes)
    radius = 1.01 * THRESHOLD * len(mean) ** 0.5
    found = list[Duplicate]()
    is_found = np.zeros(len(rows), bool)
    for i, like in enumerate(rows):
        if like[0] == "train" and is_found[i]:
            continue
        for is_mirrored in (False, True):
            thumbnail = thumbnails[i].astype(np.int64)
            if is_mirrored:
                thumbnail = thumbnail[:, ::-1]
            near = np.array(tree.query_ball_point((thumbnail.reshape(-1) - mean) @ axes, radius), np.int64)
            near = near[(near > i) & ~is_found[near]]
            if is_found[i]:
                near = near[split_of[near] != split_of[i]]
            distances = np.sqrt(((thumbnails[near] - thumbnail) ** 2).mean((1, 2, 3)))
            for j, distance in zip(near, distances, strict=True):
                if distance <= THRESHOLD:
                    is_found[j] = True
                    in_one_split = rows[j][0] == like[0]
                    found.append(Duplicate(in_one_split, float(distance), rows[j], like, is_mirrored))
    return sorted(found)


def write(
    source: Any, location: Location, manifest: Manifest, shows_progress: bool = True
) -> list[Duplicate]:
    """Find near-duplicates, and write a picture of pairs, and their list, which begins with their number."""
    found = find(location, manifest, shows_progress)
    total = sum(split.num_rows for split in manifest.splits.values())
    num_leaks = sum(not pair.in_one_split for pair in found)
    lines = [f"{len(found):,} of {total:,} images look like another, {num_leaks:,} like one of another split"]
    # If some images could not be read, the source numbers them otherwise.
    has_names = hasattr(source, "name_of") and total == sum(source.splits.values())

    def name(row: RowKey) -> str:
        split, i = row
        return f"{split} {source.name_of(split, i) if has_names else i}"

    for pair in found:
        mirrored = ", mirrored" if pair.is_mirrored else ""
        lines.append(
            printable(f"{name(pair.row)} looks like {name(pair.like)} ({pair.distance:.2f}{mirrored})")
        )
    if found:
        pictured = []
        for i in np.unique(np.linspace(0, len(found) - 1, MAX_PICTURED).astype(int)):
            pictured += [found[i].like, found[i].row]
        sheet = grid(images_at(location, manifest, pictured), PICTURE_COLUMNS)
        location.child(PICTURE).write(png_bytes(sheet), durable=True)
    location.child(LISTED).write("".join(f"{line}\n" for line in lines).encode(), durable=True)
    return found


def report(
    source: Any,
    location: Location,
    manifest: Manifest,
    dropped: bool = False,
    shows_progress: bool = True,
) -> Iterator[str]:
    """The lines on near-duplicates for the user: their number, and where picture and list are."""
    if sum(split.num_rows for split in manifest.splits.values()) > MAX_EXAMINED:
        yield f"duplicates  not searched for: there are more than {MAX_EXAMINED:,} images"
        return
    listed = location.child(LISTED)
    picture = location.child(PICTURE)
    with as_user_error("the data set is complete, but it cannot be searched for duplicates"):
        if not listed.exists():
            write(source, location, manifest, shows_progress)
        yield f"{'left out' if dropped else 'duplicates':<11} {listed.read().decode().splitlines()[0]}"
        if picture.exists():
            yield f"            {printable(f'{picture.uri}, {listed.uri}')}"


def drop(location: Location, split: str, shards: list[Shard], dropped: Set[RowKey]) -> list[Shard]:
    """Write shards again without the rows `dropped`, and return those that are left.

    If the process was killed before, incomplete shards are written again.
    """
    kept = list[Shard]()
    begin = 0
    for shard in shards:
        rows = [row for row in range(shard.num_rows) if (split, begin + row) not in dropped]
        begin += shard.num_rows
        file = location.child(shard.path)
        if not rows:
            file.unlink()
            continue
        if len(rows) < shard.num_rows:
            table = pq.ParquetFile(file.path, filesystem=location.filesystem).read().take(rows)
            images, labels = columns(table)
            shard = write_shard(location, shard.path, images, labels, rows_per_row_group=shard.row_groups[0])
        kept.append(shard)
    if not kept:
        raise UserError(f"each {split} image looks like a held-out one; prepare other images")
    return kept


def images_at(location: Location, manifest: Manifest, rows: Sequence[RowKey]) -> Pixels:
    """These images of the data set, uint8 [N, H, W, C]."""
    images = []
    for split, index in rows:
        sizes = [size for shard in manifest.splits[split].shards for size in shard.row_groups]
        begins = np.cumsum([0, *sizes])
        row_group = int(np.searchsorted(begins, index, "right")) - 1
        inside = np.array([index - begins[row_group]])
        pixels, _ = read_row_group(location, manifest, split, row_group, inside)
        images.append(pixels[0])
    return np.stack(images)


def _thumbnails(
    location: Location, manifest: Manifest, splits: Sequence[str], shows_progress: bool
) -> Pixels:
    """uint8 [N, SIDE, SIDE, C] of all images, split by split."""
    thumbnails = list[Pixels]()
    row_groups = [(split, i) for split in splits for i in range(manifest.splits[split].row_group_ends[-1])]
    shown: Iterable[tuple[str, int]] = row_groups
    if shows_progress:
        shown = track("row groups compared", len(row_groups), row_groups)
    for split, i in shown:
        for image in read_row_group(location, manifest, split, i)[0]:
            pillow = Image.fromarray(image[..., 0] if manifest.channels == 1 else image)
            thumbnails.append(np.asarray(pillow.resize((SIDE, SIDE), Image.Resampling.BOX)))
    return np.stack(thumbnails).reshape(-1, SIDE, SIDE, manifest.channels)
