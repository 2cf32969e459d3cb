"""Costs of larger data sets: planning and seeking over row groups, and the memory of a reader over images.

    python benchmarks/data_growth.py

The table goes to benchmarks/data_growth.md, the plot to benchmarks/data_growth.png.
"""

import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from harness import processes, tables
from harness.arguments import read

from ddpm.data.manifest import Manifest, Shard, make_manifest, read_manifest, write_manifest
from ddpm.data.reading import DataSet
from ddpm.data.shards import locate, write_shard
from ddpm.runs.storage import resolve

WINDOW = 8192
ROWS = 1024
GROUPS_PER_SHARD = 16
SEEKS = 200
QUANTITIES = {
    "first": "first position of an epoch, ms",
    "window": "every other window, ms",
    "locate": "shard of a row group, µs",
    "unpack": "data set unpacked, ms",
}
"""Measured quantities of planning; all but the first and the last recur."""


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    row_groups: tuple[int, ...] = (10, 100, 1_000, 10_000, 100_000)
    images: tuple[int, ...] = (16_384, 65_536, 262_144)
    peak: str | None = None
    """Used by this program: only read this data set, and return the peak of memory."""


def manifest_of(row_groups: int) -> Manifest:
    """The manifest of a data set of 32x32x3 images, without its files."""
    shards = []
    for k, first in enumerate(range(0, row_groups, GROUPS_PER_SHARD)):
        groups = (ROWS,) * min(GROUPS_PER_SHARD, row_groups - first)
        checksum = "0" * 64
        path = f"train/{k:05d}.parquet"
        shards.append(Shard(path, sum(groups), groups, 1, checksum, (checksum,) * len(groups)))
    return make_manifest("growth", (32, 32, 3), "raw", [], {"train": shards}, "")


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def planning(row_groups: int) -> dict[str, float]:
    """The QUANTITIES of a data set with this many row groups."""
    data_set = DataSet(resolve("nowhere"), manifest_of(row_groups), "train")
    packed = pickle.dumps(data_set)
    random = np.random.default_rng(0)
    first = []
    window = []
    for epoch in range(3):
        plan = data_set.plan(0, WINDOW)
        start = epoch * plan.num_images
        first.append(seconds(lambda: next(plan.windows(start, start + 1))))  # noqa: B023
        for position in (start + random.integers(0, plan.num_images, SEEKS)).tolist():
            window.append(seconds(lambda: next(plan.tasks(position, position + 1))))  # noqa: B023
            window[-1] += seconds(lambda: next(plan.windows(position, position + 1)))  # noqa: B023
    places = random.integers(0, row_groups, SEEKS).tolist()
    return {
        "first": 1e3 * statistics.median(first),
        "window": 1e3 * statistics.median(window),
        "locate": 1e6 * statistics.median(seconds(lambda: locate(data_set.rows, k)) for k in places),  # noqa: B023
        "unpack": 1e3 * statistics.median(seconds(lambda: pickle.loads(packed)) for _ in range(3)),
    }


def peak(folder: str) -> None:
    """Read an epoch, and print the peak memory of the process, in MiB, beyond its peak at the start."""
    before = _peak_kib()
    location = resolve(folder)
    data_set = DataSet(location, read_manifest(location), "train")
    plan = data_set.plan(0, WINDOW)
    for start, stop in plan.tasks(0, plan.num_images):
        for _ in data_set.parts(plan, start, stop):
            pass
    processes.answer((_peak_kib() - before) / 1024)


def _peak_kib() -> int:
    """Peak memory of this program; getrusage would include the parent's memory at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def memory(folder: Path, images: int) -> float:
    """MiB at the peak of reading an epoch of `images` images, in a separate process."""
    location = resolve(str(folder))
    shards = []
    random = np.random.default_rng(0)
    for k in range(images // (ROWS * GROUPS_PER_SHARD)):
        pixels = random.integers(0, 256, (ROWS * GROUPS_PER_SHARD, 32, 32, 3), np.uint8)
        path = f"train/{k:05d}.parquet"
        shards.append(write_shard(location, path, pixels, None, rows_per_row_group=ROWS))
    manifest = make_manifest("growth", (32, 32, 3), "raw", [], {"train": shards}, "")
    write_manifest(location, manifest)
    return float(processes.ask([sys.executable, __file__, "--peak", str(folder)]))


def main() -> None:
    arguments = read(Arguments, __doc__, row_groups=(10, 100), images=(16_384,))
    if arguments.peak:
        peak(arguments.peak)
        return
    sizes = arguments.row_groups
    plans = {n: planning(n) for n in sizes}
    held = {}
    for images in arguments.images:
        with tempfile.TemporaryDirectory() as folder:
            held[images] = memory(Path(folder), images)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for key, marker in zip(("first", "window", "unpack"), "osd", strict=True):
        left.loglog(sizes, [plans[n][key] for n in sizes], marker=marker, label=QUANTITIES[key])
    left.set(xlabel="row groups", ylabel="ms")
    left.legend(frameon=False)
    right.semilogx(list(held), list(held.values()), marker="o")
    right.set(xlabel="images (32x32x3)", ylabel="MiB at the peak of reading")
    right.set_ylim(0, 1.3 * max(held.values()))
    figure.savefig(tables.result(Path(__file__).with_suffix(".png")), dpi=120)
    plan_rows = (
        [f"{n:,}", f"{n * ROWS:,}", *(f"{of[key]:.2f}" for key in QUANTITIES)] for n, of in plans.items()
    )
    held_rows = ([f"{n:,}", f"{n * 3072 / 2**20:,.0f} MiB", f"{mib:,.0f} MiB"] for n, mib in held.items())
    tables.write(
        __file__,
        "What more data costs",
        f"`python benchmarks/data_growth.py`, {tables.machine('numpy')}. Row groups of {ROWS:,} images, windows of "
        f"{WINDOW:,}; medians.",
        "",
        *tables.table(["row groups", "images", *QUANTITIES.values()], plan_rows),
        "",
        "The order of an epoch's row groups is computed once an epoch and process, and the data set is unpacked once a "
        "process; from then on a window costs a binary search and the permutation of its own rows.",
        "",
        *tables.table(["images", "on disk", "memory at the peak of reading an epoch"], held_rows),
        "",
        "![the same as a picture](data_growth.png)",
    )


if __name__ == "__main__":
    main()
