"""A worker pool runs every piece once, in this process or on Ray, even if workers are killed."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from support import pool_functions
from support.pool_functions import Adder

from ddpm.sampling.pool import WorkerPool, WorkersDied
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
    before = torch.get_num_threads()
    info = partial(pool_functions.worker_info, tmp_path, num_workers or 1)
    with WorkerPool(MAKE, num_workers) as pool:
        done = [result for _, result in pool.map(info, range(6))]
    assert {(threads, device) for _, threads, device in done} == {(1, "cpu")}
    processes = {process for process, _, _ in done}
    if num_workers is None:
        assert processes == {os.getpid()}
    else:
        assert len(processes) >= num_workers
        assert os.getpid() not in processes
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


@pytest.mark.parametrize("num_workers", [None, 2])
def test_abandoning_the_results_ends_running_pieces(num_workers: int | None) -> None:
    with WorkerPool(MAKE, num_workers) as pool:
        results = pool.map(pool_functions.run_for_ever, range(100))
        assert next(results) == (0, 0)
        results.close()
        assert len(list(pool.map(Adder.add, range(10)))) == 10  # its workers are free again


def test_a_worker_process_makes_its_object_once() -> None:
    with WorkerPool(MAKE, 2) as pool:
        made = {result for _, result in pool.map(pool_functions.num_made, range(20))}
    processes = {process for process, _ in made}
    assert len(made) == len(processes)


def test_a_killed_worker_loses_no_piece(tmp_path: Path) -> None:
    with WorkerPool(MAKE, 2) as pool:
        done = dict(pool.map(partial(pool_functions.die_once, tmp_path), range(8)))
        assert done == {i: 100 + i for i in range(8)}
        assert (tmp_path / "died").exists()


def test_a_piece_that_kills_every_worker_is_a_user_error() -> None:
    with WorkerPool(MAKE, 2) as pool, pytest.raises(WorkersDied, match="piece 1 ") as raised:
        list(pool.map(pool_functions.die, [1]))
    assert raised.value.exit_code == 1


def test_the_pool_does_not_wait_for_workers_that_cannot_be_placed() -> None:
    with WorkerPool(MAKE, 1000) as pool:
        assert len(list(pool.map(Adder.add, range(20)))) == 20
