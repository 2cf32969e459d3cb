"""What a worker gets out of the stream, in which order, and what it is told when reading fails.

That training on it is the same with any number of workers is in tests/training.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import damaged
import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem

from ddpm.config import Config, override
from ddpm.data import librarian as librarians
from ddpm.data import stream
from ddpm.data.corrupt import CorruptData, Substitution
from ddpm.data.plan import share
from ddpm.data.reading import DataSet
from ddpm.data.shards import Manifest, Shard, Split
from ddpm.training.runtime import cut
from ddpm.utils.errors import UserError
from ddpm.utils.retry import StorageError


class Rows:
    """Stands for a Ray Data iterator that a cluster without a free CPU never serves."""

    def __init__(self, rows: int, hang: bool) -> None:
        self._rows, self._hang = rows, hang

    def iter_batches(self, **kwargs: Any) -> Iterator[dict[str, int]]:
        for i in range(self._rows):
            yield {"row": i}
        if self._hang:
            time.sleep(30)
        raise OSError("the store is gone")


def test_silence_becomes_an_error() -> None:
    rows = stream._with_timeout(Rows(2, hang=True), 0.2, 0.3)  # type: ignore[arg-type]
    assert [next(rows)["row"], next(rows)["row"]] == [0, 1]
    with pytest.raises(
        UserError, match=r"no data for 0\.5 s \(data\.stall_timeout_s 0\.2 \+ run\.storage_timeout_s 0\.3\)"
    ):
        next(rows)


def test_what_reading_raises_is_raised_in_training() -> None:
    rows = stream._with_timeout(Rows(1, hang=False), 5, 0)  # type: ignore[arg-type]
    next(rows)
    with pytest.raises(OSError, match="the store is gone"):
        next(rows)


def test_a_worker_that_stops_lets_the_reader_go() -> None:
    others = set(threading.enumerate())
    rows = stream._with_timeout(Rows(1000, hang=True), 5, 0)  # type: ignore[arg-type]
    next(rows)
    (reader,) = set(threading.enumerate()) - others
    rows.close()  # type: ignore[attr-defined]
    reader.join(10)
    assert not reader.is_alive()


def test_a_long_run_is_several_datasets_without_a_seam() -> None:
    config = override(Config(), {"train.total_images": 30_000_000})
    shards = (Shard("train/00000.parquet", 50_000, (1000,) * 50, 1, "", ("",) * 50),)
    manifest = Manifest("", "", 32, 32, 3, "raw", (), {"train": Split(50_000, "", shards)}, "")
    parts = list(stream.legs(config, DataSet(LocalFileSystem(), "", manifest, "train"), images_seen=12_800))
    assert all(len(part) <= stream.MAX_TASKS for part in parts) and len(parts) > 3
    tasks = [task for part in parts for task in part]
    assert tasks[0][0] == 12_800 and tasks[-1][1] == 30_000_000
    assert all(a[1] == b[0] for a, b in itertools.pairwise(tasks))


@pytest.fixture(scope="module")
def librarian() -> Iterator[Any]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield librarians.employ(num_workers=2)
    ray.shutdown()


def configured(folder: Path, **data: Any) -> Config:
    """Two epochs of the 60 numbers in ten global batches of 12, each of 4 micro-batches; reading tasks of 1 and 4."""
    values = {
        "data.shards": str(folder),
        "data.window_rows": damaged.PLAN[1],
        "model.image_size": damaged.SIDE,
        "model.channels": 1,
        "train.seed": damaged.PLAN[0],
        "train.total_images": 120,
        "train.batch_size": 12,
        "train.micro_batch_size": 3,
        "run.storage_timeout_s": 0.5,
    }
    return override(Config(), values | {f"data.{key}": value for key, value in data.items()})


def work(librarian: Any, config: Config, images_seen: int = 0, world_size: int = 2) -> list[dict[str, Any]]:
    """What each rank takes from its iterator until the end or an error, in a process of its own as in training."""
    import ray

    def take(iterator: Any, rank: int) -> dict[str, Any]:
        taken: dict[str, Any] = {"batches": [], "told": [], "error": None}

        def on_substitutions(substitutions: list[Substitution]) -> None:
            taken["told"].append((len(taken["batches"]), substitutions))

        try:
            sizes = (config.train.batch_size, config.train.micro_batch_size)
            shares = stream.shares(iterator, config, on_substitutions)
            for batch in cut(shares, rank, world_size, *sizes):
                taken["batches"].append((batch.index, batch.image.numpy(), batch.label.numpy()))
        except Exception as error:
            taken["error"] = error
        return taken

    data_set = stream.open_data_set(config)
    (todo,) = stream.legs(config, data_set, images_seen)
    iterators = ray.get(librarian.split.remote(config, data_set, todo, images_seen, world_size))
    worker = ray.remote(num_cpus=0)(take)
    return ray.get([worker.remote(iterator, rank) for rank, iterator in enumerate(iterators)])


@pytest.mark.slow
def test_the_stream_is_the_plan_with_its_stand_ins(librarian: Any, tmp_path: Path) -> None:
    damaged.prepare(str(tmp_path))
    damaged.damage_row_group(tmp_path, 0, 1)
    config = configured(tmp_path, on_corrupt="substitute")
    data_set = stream.open_data_set(config)
    # All; and from where the first part is one image, none for the second rank.
    for start, stop in ((87, 123), (0, 120)):
        images = data_set.read(data_set.plan(*damaged.PLAN), start, stop, "substitute")
        workers = work(librarian, config, start)
        for rank, worker in enumerate(workers):
            assert worker["error"] is None
            mine = [share(rows, 0, rank, 2, 3) for rows in (images.image, images.label)]
            expected = list(cut([(mine[0], mine[1])], rank, 2, 12, 3))
            assert len(worker["batches"]) == len(expected) == (stop - start) // 6
            for (index, image, label), wanted in zip(worker["batches"], expected, strict=True):
                assert index == wanted.index
                assert np.array_equal(image, wanted.image) and np.array_equal(label, wanted.label)
    assert workers[1]["told"] == []
    assert tuple(s for _, told in workers[0]["told"] for s in told) == images.substitutions
    for batches, told in workers[0]["told"]:  # before any of the images that they are about
        assert min(s.position for s in told) // 12 * 2 >= batches


@pytest.mark.slow
def test_what_reading_finds_is_raised_in_every_worker(librarian: Any, tmp_path: Path) -> None:
    damaged.prepare(str(tmp_path))
    damaged.rewrite(tmp_path, 2, lambda data: data[:100])
    config = configured(tmp_path)
    data_set = stream.open_data_set(config)
    with pytest.raises(CorruptData) as caught:
        data_set.read(data_set.plan(*damaged.PLAN), 0, 120)
    workers = work(librarian, config)
    assert [type(worker["error"]) for worker in workers] == [CorruptData] * 2
    assert [str(worker["error"]) for worker in workers] == [str(caught.value)] * 2
    # A folder where a file should be is no damage that a checksum could show.
    damaged.rewrite(tmp_path, 2, lambda data: None)
    (tmp_path / "train/00002.parquet").mkdir()
    for policy in ("error", "substitute"):
        workers = work(librarian, configured(tmp_path, on_corrupt=policy))
        assert [type(worker["error"]) for worker in workers] == [StorageError] * 2
        assert all(
            str(worker["error"]).startswith(f"{tmp_path}: storage has failed for") for worker in workers
        )
