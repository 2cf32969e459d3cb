"""Near-duplicates in a data set: images that look like another one of the same split, or of another (a leak).

Two images look alike if the root mean square of the differences of their thumbnails, of SIDE x SIDE pixels, is at most
THRESHOLD grey levels; one of them may be mirrored. docs/data.md says what this finds, and what it does not.

Axes: N images, H W, C channels.
"""

from collections.abc import Iterator, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from ddpm.data.manifest import Manifest, Shard
from ddpm.data.row_group import Pixels, columns
from ddpm.data.shards import read_row_group, write_shard
from ddpm.data.sources import MAX_EXAMINED
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError
from ddpm.utils.images import grid, png_bytes
from ddpm.utils.progress import printable, track
from ddpm.utils.retry import as_user_error

LISTED, PICTURE, PICTURED, COLUMNS = "duplicates.txt", "duplicates.png", 64, 16
SIDE, THRESHOLD = 8, 2.5
COMPONENTS = 16
"""Principal components of the thumbnails, in which they are searched."""
Row = tuple[str, int]
"""An image: its split, and its position there."""


class Duplicate(NamedTuple):
    """An image that looks like an earlier one; the images of "train" come last."""

    in_one_split: bool
    distance: float
    row: Row
    like: Row
    is_mirrored: bool


def find(location: Location, manifest: Manifest) -> list[Duplicate]:
    """The images that look like an earlier one: those of two splits first, then the nearest.

    Of the others, no two of a split look alike, and none of "train" looks like any held-out image.
    """
    from scipy.spatial import KDTree  # takes a second to import

    splits = sorted(manifest.splits, key=lambda split: (split == "train", split))
    rows = [(split, i) for split in splits for i in range(manifest.splits[split].num_rows)]
    split_of = np.array([splits.index(split) for split, _ in rows])
    thumbs = _thumbnails(location, manifest, splits)
    # A projection lengthens no distance, so its radius loses no pair; which are near is then decided by integers.
    values = thumbs.reshape(len(rows), -1).astype(np.float32)
    values -= (mean := values.mean(0))
    axes = np.linalg.eigh(values.T @ values)[1][:, -COMPONENTS:]
    tree, radius = KDTree(values @ axes), 1.01 * THRESHOLD * len(mean) ** 0.5
    found, is_found = list[Duplicate](), np.zeros(len(rows), bool)
    for i, like in enumerate(rows):
        for is_mirrored in (False, True) if like[0] != "train" or not is_found[i] else ():
            thumb = thumbs[i, :, :: -1 if is_mirrored else 1].astype(np.int64)
            near = np.array(tree.query_ball_point((thumb.reshape(-1) - mean) @ axes, radius), np.int64)
            near = near[(near > i) & ~is_found[near] & (~is_found[i] | (split_of[near] != split_of[i]))]
            distance = np.sqrt(((thumbs[near] - thumb) ** 2).mean((1, 2, 3)))
            for j, of_j in zip(near[distance <= THRESHOLD], distance[distance <= THRESHOLD], strict=True):
                is_found[j] = True
                found.append(Duplicate(rows[j][0] == like[0], float(of_j), rows[j], like, is_mirrored))
    return sorted(found)


def write(source: Any, location: Location, manifest: Manifest) -> list[Duplicate]:
    """Find near-duplicates, and write a picture of pairs, and their list, which begins with their number."""
    found, total = find(location, manifest), sum(split.num_rows for split in manifest.splits.values())
    leaks = f"{sum(not pair.in_one_split for pair in found):,} like one of another split"
    lines = [f"{len(found):,} of {total:,} images look like another, {leaks}"]
    is_known = hasattr(source, "name_of") and total == sum(source.splits.values())  # all could be read
    name_of = source.name_of if is_known else lambda split, i: i
    for _, distance, row, like, is_mirrored in found:
        named = (f"{split} {name_of(split, i)}" for split, i in (row, like))
        lines.append(printable(f"{' looks like '.join(named)} ({distance:.2f}{', mirrored' * is_mirrored})"))
    if found:
        chosen = np.unique(np.linspace(0, len(found) - 1, PICTURED).astype(int))
        pairs = images_at(location, manifest, [row for i in chosen for row in (found[i].like, found[i].row)])
        location.child(PICTURE).write(png_bytes(grid(pairs, COLUMNS)), durable=True)
    location.child(LISTED).write("".join(f"{line}\n" for line in lines).encode(), durable=True)
    return found


def report(source: Any, location: Location, manifest: Manifest, dropped: bool = False) -> Iterator[str]:
    """The lines on near-duplicates for who prepares a data set: their number, and where picture and list are."""
    if sum(split.num_rows for split in manifest.splits.values()) > MAX_EXAMINED:
        yield f"duplicates  not searched for: there are more than {MAX_EXAMINED:,} images"
        return
    listed, picture = location.child(LISTED), location.child(PICTURE)
    with as_user_error("the data set is complete, but it cannot be searched for duplicates"):
        if not listed.exists():
            write(source, location, manifest)
        yield f"{'left out' if dropped else 'duplicates':<11} {listed.read().decode().splitlines()[0]}"
        if picture.exists():
            yield f"            {printable(f'{picture.uri}, {listed.uri}')}"


def drop(location: Location, split: str, shards: list[Shard], dropped: Set[Row]) -> list[Shard]:
    """Write shards again without the rows `dropped`; after a kill they are made anew, since they have too few rows."""
    kept, begin = list[Shard](), 0
    for shard in shards:
        rows = [row for row in range(shard.num_rows) if (split, begin + row) not in dropped]
        begin, file = begin + shard.num_rows, location.child(shard.path)
        if 0 < len(rows) < shard.num_rows:
            content = columns(pq.ParquetFile(file.path, filesystem=location.filesystem).read().take(rows))
            shard = write_shard(location, shard.path, *content, rows_per_row_group=shard.row_groups[0])
        kept.append(shard) if rows else file.unlink()
    if not kept:
        raise UserError(f"each {split} image looks like a held-out one; prepare other images")
    return kept


def images_at(location: Location, manifest: Manifest, rows: Sequence[Row]) -> Pixels:
    """These images of the data set, uint8 [N, H, W, C]."""
    images = []
    for split, index in rows:
        begins = np.cumsum([0, *(n for shard in manifest.splits[split].shards for n in shard.row_groups)])
        group = int(np.searchsorted(begins, index, "right")) - 1
        images += [*read_row_group(location, manifest, split, group, np.array([index - begins[group]]))[0]]
    return np.stack(images)


def _thumbnails(location: Location, manifest: Manifest, splits: Sequence[str]) -> Pixels:
    """uint8 [N, SIDE, SIDE, C] of all images, split by split."""
    thumbs = list[Pixels]()
    groups = [(split, i) for split in splits for i in range(manifest.splits[split].row_group_ends[-1])]
    for group in track("row groups compared", len(groups), groups):
        for image in read_row_group(location, manifest, *group)[0]:
            flat = Image.fromarray(image[..., 0] if manifest.channels == 1 else image)
            thumbs.append(np.asarray(flat.resize((SIDE, SIDE), Image.Resampling.BOX)))
    return np.stack(thumbs).reshape(-1, SIDE, SIDE, manifest.channels)
