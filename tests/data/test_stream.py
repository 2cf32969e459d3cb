"""What of the stream needs no cluster; the rest is trained on in tests/training/test_cluster.py."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ddpm.config import Config, UserError, override
from ddpm.data import stream


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
    rows = stream._with_timeout(Rows(2, hang=True), timeout_s=0.5)  # type: ignore[arg-type]
    assert [next(rows)["row"], next(rows)["row"]] == [0, 1]
    with pytest.raises(UserError, match=r"no data for 0\.5 s \(data\.stall_timeout_s\)"):
        next(rows)


def test_what_reading_raises_is_raised_in_training() -> None:
    rows = stream._with_timeout(Rows(1, hang=False), timeout_s=5)  # type: ignore[arg-type]
    next(rows)
    with pytest.raises(OSError, match="the store is gone"):
        next(rows)


def test_a_long_run_is_several_datasets_without_a_seam() -> None:
    config = override(Config(), {"train.total_images": 30_000_000})
    parts = stream.legs(config, images_seen=12_800)
    assert all(len(part) <= stream.MAX_TASKS for part in parts) and len(parts) > 3
    tasks = [task for part in parts for task in part]
    assert tasks[0][0] == 12_800 and tasks[-1][1] == 30_000_000
    assert all(a[1] == b[0] for a, b in itertools.pairwise(tasks))
