"""A warning about labels that run in blocks, as those of a set that is sorted by class do.

Training shuffles images within windows of row groups. If each row group has few classes, so has a window, and its
global batches resemble each other more than those of the whole set would.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ddpm.data.reading import DataSet
from ddpm.data.row_group import Labels
from ddpm.data.shards import DAMAGE, locate

SAMPLED = 16
"""Row groups whose labels are read, all at once: three requests each, less than 100 KB."""
FEW = 0.5
"""Share of the set's classes below which those of a window are too few."""


def warning(data_set: DataSet, window_rows: int) -> str | None:
    """A warning if a window has few of the classes; None: it has most of them, or the labels cannot be read.

    Two images have the same class with probability 1 / n if n classes are equally frequent. The inverse of this
    probability counts the classes of a window, and those of the whole set, however their frequencies differ.
    """
    num_classes = len(data_set.manifest.class_names)
    plan = data_set.plan(seed=0, window_rows=window_rows)
    num_groups = len(plan.row_groups)
    window = next(plan.windows(0, 1))
    groups_per_window = len(np.unique(window.row_groups))
    if num_classes == 0 or groups_per_window == num_groups:
        return None
    sampled = np.random.RandomState(0).permutation(num_groups)[:SAMPLED].tolist()
    try:
        with ThreadPoolExecutor(SAMPLED, thread_name_prefix="ddpm-labels") as pool:
            labels = list(pool.map(partial(_labels, data_set), sampled))
    except DAMAGE:  # training reads them, too, and says what is wrong
        return None
    valid = [label[(label >= 0) & (label < num_classes)] for label in labels]
    counts = np.stack([np.bincount(label, minlength=num_classes) for label in valid])  # [groups, classes]
    sizes = counts.sum(1)
    pairs_in_groups = (sizes * (sizes - 1)).sum()
    pairs_of_groups = sizes.sum() ** 2 - (sizes**2).sum()
    if pairs_in_groups == 0 or pairs_of_groups == 0:
        return None
    same_in_groups = (counts * (counts - 1)).sum() / pairs_in_groups
    same_of_groups = ((counts.sum(0) ** 2).sum() - (counts**2).sum()) / pairs_of_groups

    def classes_in(groups: int) -> float:
        """The number of classes in `groups` row groups; 1 / groups of the pairs of images lie in one row group."""
        same = same_in_groups / groups + same_of_groups * (1 - 1 / groups)
        return float(1 / max(same, 1 / num_classes))

    in_window = classes_in(groups_per_window)
    in_set = classes_in(num_groups)
    if in_window >= FEW * in_set:
        return None
    return (
        f"the labels of {data_set.location.uri} run in blocks: the {len(window.rows):,} images that are shuffled "
        f"together are of about {in_window:.0f} classes, those of the whole set of {in_set:.0f}; prepare them in "
        f"random order, as ddpm prepare does, or raise --data.window-rows ({window_rows:,})"
    )


def _labels(data_set: DataSet, index: int) -> Labels:
    """The labels of a row group; nothing else of it is read."""
    shard, inside = locate(data_set.rows, index)
    path = data_set.location.child(shard.path).path
    with data_set.location.filesystem.open_input_file(path) as file:
        table = pq.ParquetFile(file).read_row_group(inside, columns=["label"], use_threads=False)
    label: NDArray[np.int64] = table.column(0).to_numpy()
    return label
