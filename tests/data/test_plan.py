"""The order is a pure function, covers every image once per epoch, and does not depend on the number of workers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data.plan import Plan, ReadOrder, last_position, permutation, rank_shard, uneven_share
from ddpm.utils.errors import UserError


def order(plan: Plan, start: int, stop: int) -> np.ndarray:
    """[stop - start, 2]: row group and row at every position."""
    windows = list(plan.windows(start, stop))
    assert all(a.start + len(a.rows) == b.start for a, b in itertools.pairwise(windows))
    found = np.concatenate([np.stack([window.row_groups, window.rows], 1) for window in windows])
    return found[start - windows[0].start :][: stop - start]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 30), st.data())
@settings(max_examples=60, deadline=None)
def test_any_range_is_a_slice_of_the_whole_order(
    row_groups: list[int], seed: int, window_rows: int, data: st.DataObject
) -> None:
    plan = Plan(tuple(row_groups), seed, window_rows)
    whole = order(plan, 0, 3 * plan.num_images)
    start = data.draw(st.integers(0, 3 * plan.num_images - 1))
    stop = data.draw(st.integers(start + 1, 3 * plan.num_images))
    assert (order(plan, start, stop) == whole[start:stop]).all()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_every_image_once(row_groups: list[int], seed: int, window_rows: int) -> None:
    plan = Plan(tuple(row_groups), seed, window_rows)
    everything = {(group, row) for group, rows in enumerate(row_groups) for row in range(rows)}
    for epoch in range(3):
        shown = order(plan, epoch * plan.num_images, (epoch + 1) * plan.num_images)
        assert set(map(tuple, shown.tolist())) == everything


def test_epochs_and_seeds_differ() -> None:
    plan = Plan((50, 50, 50), seed=0, window_rows=100)
    first = order(plan, 0, 150)
    second = order(plan, 150, 300)
    assert (first != second).any()
    assert (first != order(Plan((50, 50, 50), seed=1, window_rows=100), 0, 150)).any()


def test_a_window_shuffles_only_its_own_row_groups() -> None:
    plan = Plan((100,) * 6, seed=0, window_rows=300)
    groups = order(plan, 0, 600)[:, 0]
    assert len(set(groups[:300])) == 3
    assert not set(groups[:300]) & set(groups[300:])
    assert len(set(groups[:30])) == 3  # shuffled from the first images on


def test_the_order_never_changes_between_versions() -> None:
    """Runs must be able to resume after an upgrade: these numbers must not change."""
    assert permutation(8, 7, 0, 0).tolist() == [2, 0, 7, 5, 3, 6, 4, 1]
    assert order(Plan((4, 4), seed=1, window_rows=8), 0, 8).tolist() == (
        [[1, 0], [0, 3], [0, 0], [0, 1], [1, 3], [1, 1], [0, 2], [1, 2]]
    )


def test_seeking_does_not_compute_earlier_windows() -> None:
    plan = Plan((1000,) * 1000, seed=0, window_rows=8000)
    windows = list(plan.windows(123_456_789, 123_456_789 + 128))
    assert windows[0].start <= 123_456_789
    assert sum(len(set(window.row_groups.tolist())) for window in windows) <= 16


def test_ranks_take_micro_batches_in_turn() -> None:
    rows = np.arange(24)  # two global batches of 12, micro-batches of 2
    order = ReadOrder(batch_size=12, micro_batch_size=2, total_images=24)
    assert rank_shard(rows, 0, order.share(1, 3), 2).tolist() == [2, 3, 8, 9, 14, 15, 20, 21]
    # Four ranks share six micro-batches: the first two take one more.
    assert rank_shard(rows, 0, order.share(1, 4), 2).tolist() == [2, 3, 10, 11, 14, 15, 22, 23]
    assert rank_shard(rows, 0, order.share(3, 4), 2).tolist() == [6, 7, 18, 19]
    for n in range(1, 7):
        shares = [order.share(rank, n) for rank in range(n)]
        dealt = np.concatenate([rank_shard(rows, 0, share, 2) for share in shares])
        assert sorted(dealt.tolist()) == rows.tolist()
        for share in shares:  # wherever the range is split
            parts = [rank_shard(rows[low:high], low, share, 2) for low, high in ((0, 5), (5, 6), (6, 24))]
            assert np.concatenate(parts).tolist() == rank_shard(rows, 0, share, 2).tolist()


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 30), st.integers(1, 40), st.data()
)
@settings(max_examples=60, deadline=None)
def test_tasks_are_whole_windows(
    row_groups: list[int], window_rows: int, max_rows: int, data: st.DataObject
) -> None:
    plan = Plan(tuple(row_groups), 0, window_rows)
    start = data.draw(st.integers(0, 3 * plan.num_images - 1))
    stop = data.draw(st.integers(start + 1, 3 * plan.num_images))
    tasks = list(plan.tasks(start, stop, max_rows))
    assert tasks[0][0] == start and tasks[-1][1] == stop
    assert all(a[1] == b[0] for a, b in itertools.pairwise(tasks))
    edges = {window.start for window in plan.windows(0, stop)} | {stop}
    assert all(end in edges for _, end in tasks)
    inside = [[e for e in edges if low < e < high] for low, high in tasks]
    assert all(high - low <= max_rows or not edges for (low, high), edges in zip(tasks, inside, strict=True))


def test_training_ends_with_a_whole_global_batch() -> None:
    assert last_position(256, 10_000, 128) == 10_112
    assert last_position(256, 512, 128) == 512
    assert last_position(640, 512, 128) == 640


def test_a_global_batch_that_cannot_be_shared_is_rejected() -> None:
    for batch_size, micro_batch_size in ((128, 48), (0, 48)):
        with pytest.raises(UserError, match="micro_batch_size 48"):
            ReadOrder(batch_size, micro_batch_size, 0).share(0, 1)
    with pytest.raises(UserError, match="5 workers"):
        ReadOrder(128, 32, 0).share(0, 5)


@pytest.mark.parametrize(
    ("micro_batch_size", "workers", "line"),
    [
        (8, "1:5", "5 workers share 16 micro-batches"),
        (32, 4, None),
        (32, 3, "3 workers share 4 micro-batches"),
        (32, "1:4", "3 workers share 4 micro-batches"),
    ],
)
def test_shares_that_leave_workers_idle_are_a_warning(
    micro_batch_size: int, workers: int | str, line: str | None
) -> None:
    changes = {"train.micro_batch_size": micro_batch_size, "cluster.num_workers": workers}
    warning = uneven_share(override(Config(), changes))
    assert warning is None if line is None else warning is not None and warning.startswith(line)
