"""Batches that a worker gets from the Ray Dataset: content, order, and errors.

tests/training checks that training on them is the same with any number of workers.
"""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support import damaged
from support.processes import members, wait_for

from ddpm.data import ray_stream
from ddpm.data.manifest import Manifest, Shard, Split
from ddpm.data.plan import ReadOrder, rank_shard
from ddpm.data.ray_stream import RankReader, WrongOrder
from ddpm.data.reading import DataSet, LabelledImages, cut
from ddpm.data.row_group import CorruptData
from ddpm.runs.storage import resolve
from ddpm.utils.errors import UserError
from ddpm.utils.retry import StorageError


def priority(thread: int) -> int | None:
    """The nice value of a thread of any process; None: it has ended."""
    with suppress(ProcessLookupError):
        return os.getpriority(os.PRIO_PROCESS, thread)
    return None


@pytest.mark.parametrize(("own", "after"), [(0, ray_stream.READING_PRIORITY), (15, 15)])
def test_reading_leaves_the_cpu_to_others_without_a_right_to_more(own: int, after: int) -> None:
    """15 is what most clusters give their workers; an ordinary user may not lower it."""
    code = "import os; from ddpm.data import ray_stream; ray_stream.step_back(); print(os.nice(0))"
    ordinary = [] if os.geteuid() else ["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice"]
    command = ["nice", "-n", str(own), *ordinary, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{after}\n"), done.stderr


class FakeIterator:
    """A fake Ray Data iterator that hangs or raises after some rows, as on a cluster without a free CPU."""

    def __init__(self, rows: int, hang: bool) -> None:
        self._rows = rows
        self._hang = hang

    def iter_batches(self, **kwargs: Any) -> Iterator[dict[str, list[Any]]]:
        for i in range(self._rows):
            yield {"error": [""], "image": [i], "label": [i], "rank": [0], "start": [i], "stop": [i + 1]}
        if self._hang:
            time.sleep(30)
        raise OSError("the store is gone")


def reader_of(iterator: Any, rank: int = 0, start: int = 0, stop: int = 1000) -> RankReader:
    return RankReader(iterator, rank, start, stop, stall_timeout_s=600, storage_timeout_s=0)


def test_a_stalled_reader_is_an_error() -> None:
    rows = reader_of(FakeIterator(2, hang=True))
    assert [next(rows).image, next(rows).image] == [0, 1]
    rows._stall_timeout_s = 0.2
    rows._storage_timeout_s = 0.3
    with pytest.raises(UserError, match=r"stall_timeout_s 0\.2 \+ storage_timeout_s 0\.3"):
        next(rows)


def test_errors_of_the_reader_are_raised_in_training() -> None:
    rows = reader_of(FakeIterator(1, hang=False))
    next(rows)
    with pytest.raises(OSError, match="the store is gone"):
        next(rows)


@pytest.mark.parametrize("taken", [0, 1])
def test_the_reader_thread_ends_with_its_worker(taken: int) -> None:
    others = set(threading.enumerate())
    rows = reader_of(FakeIterator(1000, hang=True))
    for _ in range(taken):
        next(rows)
    (reader,) = set(threading.enumerate()) - others
    del rows
    reader.join(120)
    assert not reader.is_alive()


class Dealt:
    """Rows as Ray Data's iterator yields them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def iter_batches(self, **kwargs: Any) -> Iterator[dict[str, Any]]:
        yield from self._rows


def test_rows_that_are_dealt_wrongly_are_an_error() -> None:
    """Each error names the rank and the position that came, and those that had to come."""

    def row(rank: int, part: int, error: str = "") -> dict[str, Any]:
        start, stop = 100 * part, 100 * part + 100
        return {
            "error": [error],
            "image": [part],
            "label": [part],
            "rank": [rank],
            "start": [start],
            "stop": [stop],
        }

    def taken(rows: list[dict[str, Any]]) -> list[Any]:
        return [images.image for images in reader_of(Dealt(rows), rank=1, start=100, stop=400)]

    one, two, three = (row(1, part) for part in (1, 2, 3))
    assert taken([one, two, three]) == [1, 2, 3]
    wrong = {
        "another order": ([two, one, three], r"rank 1 from position 200 .* rank 1 from position 100 "),
        "another rank": ([one, row(0, 2), three], r"rank 0 from position 200 .* rank 1 from position 200 "),
        "dropped": ([one, three], r"rank 1 from position 300 .* rank 1 from position 200 "),
        "the last one dropped": ([one, two], r"rank 1 from position 300 .* position 400"),
        "repeated": ([one, one, two, three], r"rank 1 from position 100 .* rank 1 from position 200 "),
        "the last one repeated": ([one, two, three, three], r"position 300 .* position 400 "),
    }
    for rows, message in wrong.values():
        with pytest.raises(WrongOrder, match=message):
            taken(rows)
    failed = json.dumps({"kind": "CorruptData", "message": "shard 7 is damaged"})
    with pytest.raises(CorruptData, match="shard 7"):
        taken([one, row(1, 2, failed)])


def test_a_long_run_is_split_into_consecutive_datasets() -> None:
    order = ReadOrder(batch_size=128, micro_batch_size=64, total_images=30_000_000)
    shards = (Shard("train/00000.parquet", 50_000, (1000,) * 50, 1, "", ("",) * 50),)
    manifest = Manifest("", "", 32, 32, 3, "raw", (), {"train": Split(50_000, "", shards)}, "")
    data_set = DataSet(resolve("nowhere"), manifest, "train")
    chunks = list(ray_stream.dataset_chunks(data_set, order, images_seen=12_800))
    assert all(len(chunk) <= ray_stream.MAX_TASKS + 1 for chunk in chunks) and len(chunks) > 3
    assert [(chunk[-1][1] - 12_800) % 128 for chunk in chunks[:-1]] == [0] * (len(chunks) - 1)
    tasks = [task for chunk in chunks for task in chunk]
    assert tasks[0][0] == 12_800 and tasks[-1][1] == 30_000_000
    assert all(a[1] == b[0] for a, b in itertools.pairwise(tasks))


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # as on a cluster that ddpm starts
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


ORDER = ReadOrder(
    batch_size=12, micro_batch_size=3, total_images=120, seed=damaged.PLAN[0], window_rows=damaged.PLAN[1]
)
"""Two epochs of the 60 images in ten global batches of 4 micro-batches each; read tasks of 1 and 4 windows."""


def broadcaster_of(world_size: int) -> Any:
    """An actor; workers cannot import this module, so its class is local."""
    import ray

    class Broadcast:
        """Gives the value of rank 0 to the other ranks: Ray Train's broadcast without Ray Train."""

        def __init__(self) -> None:
            self._values: asyncio.Queue[Any] = asyncio.Queue()
            self._barrier = asyncio.Barrier(world_size)

        async def meet(self) -> None:
            await asyncio.wait_for(self._barrier.wait(), 60)

        async def put(self, value: Any) -> None:
            for _ in range(world_size - 1):
                await self._values.put(value)

        async def get(self) -> Any:
            return await asyncio.wait_for(self._values.get(), 60)

    return ray.remote(num_cpus=0)(Broadcast).remote()


def read_in_workers(
    data_set: DataSet,
    order: ReadOrder = ORDER,
    images_seen: int = 0,
    world_size: int = 2,
    max_tasks: int | None = None,
    swap: bool = False,
) -> list[dict[str, Any]]:
    """Read with one process per rank, as in training; returns each rank's batches and error.

    Args:
        max_tasks: MAX_TASKS is this, and the ranks wait for one another after each global batch, as in training.
        swap: Ray deals the rows of rank r to rank n - 1 - r.
    """
    import ray

    broadcaster = broadcaster_of(world_size)

    def take(rank: int) -> dict[str, Any]:
        taken: dict[str, Any] = {"batches": [], "error": None}

        def broadcast(value: Any) -> Any:
            if rank == 0 and swap:
                value = [ray.put(ray.get(reference)[::-1]) for reference in value]
            if rank == 0:
                ray.get(broadcaster.put.remote(value))
            return ray.get(broadcaster.get.remote()) if rank else value

        ray_stream.MAX_TASKS = max_tasks or 1000
        share = order.share(rank, world_size)
        batches = ray_stream.micro_batches(
            data_set,
            order,
            images_seen,
            rank=rank,
            world_size=world_size,
            broadcast=broadcast,
        )
        try:
            for batch in batches:
                taken["batches"].append((batch.index, batch.image, batch.label))
                if max_tasks is not None and batch.index == share[-1]:
                    ray.get(broadcaster.meet.remote())
        except Exception as error:
            taken["error"] = error
        return taken

    worker = ray.remote(num_cpus=0)(take)
    return ray.get([worker.remote(rank) for rank in range(world_size)])


def test_reading_ahead_follows_the_workers_within_the_object_store() -> None:
    gib = 1 << 30
    assert ray_stream.read_ahead_bytes(1, 8.0 * gib) == gib / 4
    assert ray_stream.read_ahead_bytes(4, 8.0 * gib) == gib
    assert ray_stream.read_ahead_bytes(64, 8.0 * gib) == 2 * gib


def test_invalid_read_orders_are_rejected_at_once(tmp_path: Path) -> None:
    data_set = ray_stream.open_data_set(damaged.prepare(str(tmp_path)).uri)
    with pytest.raises(UserError, match="5 workers"):
        ray_stream.micro_batches(data_set, ORDER, world_size=5)
    with pytest.raises(UserError, match="images_seen is -12"):
        ray_stream.micro_batches(data_set, ORDER, -12)


@pytest.mark.oldest_ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_get_the_plan(tmp_path: Path) -> None:
    data_set = ray_stream.open_data_set(damaged.prepare(str(tmp_path)).uri, timeout_s=0.5)
    # The full range, and one whose first part has a single image, so none for the second rank.
    for world_size, start, stop in ((2, 87, 123), (2, 0, 120), (1, 0, 120), (3, 0, 120)):
        images = data_set.read(data_set.plan(*damaged.PLAN), start, stop)
        for rank, worker in enumerate(read_in_workers(data_set, ORDER, start, world_size)):
            assert worker["error"] is None
            share = ORDER.share(rank, world_size)
            mine = [rank_shard(rows, 0, share, 3) for rows in (images.image, images.label)]
            expected = list(cut([LabelledImages(*mine)], share, 3))
            assert len(worker["batches"]) == len(expected) == (stop - start) // 12 * len(share)
            for (index, image, label), batch in zip(worker["batches"], expected, strict=True):
                assert index == batch.index
                assert np.array_equal(image, batch.image) and np.array_equal(label, batch.label)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_rank_that_is_dealt_the_rows_of_another_one_stops(tmp_path: Path) -> None:
    data_set = ray_stream.open_data_set(damaged.prepare(str(tmp_path)).uri)
    for rank, worker in enumerate(read_in_workers(data_set, swap=True)):
        assert worker["batches"] == [] and isinstance(worker["error"], WrongOrder)
        assert f"images of rank {1 - rank} " in str(worker["error"])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_all_workers_go_on_to_the_next_dataset_in_the_same_step(tmp_path: Path) -> None:
    """The first reading task ends inside a global batch, after all rows of one worker, and before the other's last."""
    data_set = ray_stream.open_data_set(damaged.prepare(str(tmp_path)).uri)
    plan = data_set.plan(*damaged.PLAN)
    begin = 7
    end = 9_007
    assert (next(plan.tasks(begin, end))[1] - begin) % 12 == 9
    order = replace(ORDER, total_images=end)
    images = data_set.read(plan, begin, end).image
    for rank, worker in enumerate(read_in_workers(data_set, order, begin, max_tasks=1)):
        assert worker["error"] is None
        taken = np.concatenate([image for _, image, _ in worker["batches"]])
        assert np.array_equal(taken, rank_shard(images, 0, order.share(rank, 2), 3))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_read_errors_are_raised_in_every_worker(tmp_path: Path) -> None:
    location = damaged.prepare(str(tmp_path))
    damaged.rewrite(tmp_path, 2, lambda data: data[:100])
    data_set = ray_stream.open_data_set(location.uri, timeout_s=0.5)
    with pytest.raises(CorruptData) as caught:
        data_set.read(data_set.plan(*damaged.PLAN), 0, 120)
    workers = read_in_workers(data_set)
    assert [type(worker["error"]) for worker in workers] == [CorruptData] * 2
    assert [str(worker["error"]) for worker in workers] == [str(caught.value)] * 2
    # A folder in place of a file is a storage error, not damage that a checksum detects.
    damaged.rewrite(tmp_path, 2, lambda data: None)
    (tmp_path / "train/00002.parquet").mkdir()
    workers = read_in_workers(data_set)
    assert [type(worker["error"]) for worker in workers] == [StorageError] * 2
    assert all(str(worker["error"]).startswith(f"{tmp_path}: storage has failed for") for worker in workers)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_no_process_is_left_after_reading_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, Datasets are read to the end, then partly, then not at all. Reading leaves the CPU to others."""
    data_set = ray_stream.open_data_set(damaged.prepare(str(tmp_path)).uri)

    def coordinators() -> list[psutil.Process]:
        return members(psutil.Process().pid, "ray::SplitCoordinator")

    def priorities() -> set[int | None]:
        readers = members(psutil.Process().pid, "ray::")
        return {priority(thread.id) for reader in readers for thread in reader.threads()}

    order = replace(ORDER, total_images=12_000)
    monkeypatch.setattr(ray_stream, "MAX_TASKS", 1)
    for taken in (4000, 1, 0):
        batches = ray_stream.micro_batches(data_set, order)
        wait_for(coordinators)  # reading starts with the call
        assert len(list(itertools.islice(batches, taken))) == taken
        wait_for(lambda: ray_stream.READING_PRIORITY in priorities())
        del batches
        wait_for(lambda: coordinators() == [])
