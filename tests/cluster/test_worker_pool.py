"""A worker pool runs every piece once, in this process or on Ray, even if workers are killed."""

from functools import partial
from pathlib import Path

import pytest
import torch
from support import pool_functions
from support.pool_functions import Adder

from ddpm.cluster.worker_pool import WorkerPool, WorkersDied
from ddpm.utils.errors import UserError

MAKE = partial(Adder, torch.tensor(100))


pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.mark.parametrize("num_workers", [None, 1, 2])
def test_every_piece_is_run_once(num_workers: int | None) -> None:
    with WorkerPool(MAKE, num_workers) as pool:
        assert dict(pool.map(Adder.add, range(10))) == {i: 100 + i for i in range(10)}
        assert list(pool.map(Adder.add, [])) == []
        assert dict(pool.map(Adder.add, [7])) == {7: 107}


@pytest.mark.parametrize("num_workers", [None, 2])
def test_a_piece_is_run_by_one_thread(num_workers: int | None, tmp_path: Path) -> None:
    before, info = torch.get_num_threads(), partial(pool_functions.worker_info, tmp_path, num_workers or 1)
    with WorkerPool(MAKE, num_workers) as pool:
        done = [result for _, result in pool.map(info, range(6))]
    assert {(threads, device) for _, threads, device in done} == {(1, "cpu")}
    assert len({process for process, _, _ in done}) == (num_workers or 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("num_workers", [None, 1, 2])
def test_a_user_error_is_raised_unchanged(num_workers: int | None) -> None:
    with WorkerPool(MAKE, num_workers) as pool:
        with pytest.raises(UserError, match=r"^piece is 3; it must not be 3$"):
            list(pool.map(pool_functions.refuse, range(10)))
        assert len(list(pool.map(Adder.add, range(10)))) == 10  # the pool still works
    with (
        WorkerPool(pool_functions.fail_to_make, num_workers) as pool,
        pytest.raises(UserError, match=r"^nothing can be made of this$"),
    ):
        list(pool.map(Adder.add, range(10)))


def test_abandoning_the_results_waits_for_nothing() -> None:
    with WorkerPool(MAKE) as pool:
        results = pool.map(pool_functions.run_slowly, range(100))
        next(results)
        results.close()  # the running pieces would take minutes


def test_a_killed_worker_loses_no_piece(tmp_path: Path) -> None:
    with WorkerPool(MAKE, 2) as pool:
        assert dict(pool.map(partial(pool_functions.die_once, tmp_path), range(8))) == {
            i: 100 + i for i in range(8)
        }
        assert (tmp_path / "died").exists()
        with pytest.raises(WorkersDied, match="3 workers died on the same piece, 1"):
            list(pool.map(pool_functions.die, [1]))


def test_the_pool_does_not_wait_for_workers_that_cannot_be_placed() -> None:
    with WorkerPool(MAKE, 1000) as pool:
        assert len(list(pool.map(Adder.add, range(20)))) == 20
