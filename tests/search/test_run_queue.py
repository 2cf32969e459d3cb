"""Workers that stay get each run once, whatever the actor that hands runs out forgets."""

from ddpm.search.run_queue import RunQueue, Task
from ddpm.training import run_state

FIRST, SECOND = Task(1, "first"), Task(2, "second")


def test_each_run_is_handed_out_once() -> None:
    state = RunQueue()
    assert state.next_run(0, None) == "wait"
    state.set(run_state.RUN, FIRST)
    state.set(run_state.PLACEMENT_GROUP, "a")
    assert state.next_run(0, None) == FIRST
    assert [state.next_run(1, ended) for ended in (None, 256, None)] == ["wait"] * 3
    assert state.snapshot()[run_state.ENDED] == 256
    assert state.next_run(0, None) == "wait"  # new workers do not train the finished run again
    state.set(run_state.RUN, SECOND)
    assert state.next_run(1, 256) == SECOND  # a late report of the first run's end is not the second's
    assert state.snapshot() == {run_state.WARNINGS: [], run_state.PLACEMENT_GROUP: "a", run_state.RUN: SECOND}
    state.set(run_state.STOP, run_state.PREEMPTION)
    assert [state.next_run(2, ended) for ended in (64, None)] == ["leave"] * 2
    assert state.snapshot()[run_state.ENDED] == 64


def test_a_restarted_actor_learns_the_run_and_its_end_again() -> None:
    state = RunQueue()
    state.set(run_state.WARNINGS, "new")
    assert state.next_run(1, 256) == "wait"  # it knows no run yet
    known = {run_state.RUN: FIRST, run_state.WORKERS: 1, run_state.WARNINGS: ["old"]}
    restored = {**known, run_state.WARNINGS: ["old", "new"]}
    assert state.restore(known) == restored == state.restore({})
    assert state.next_run(1, 256) == "wait" and state.snapshot()[run_state.ENDED] == 256
    state.close()
    assert state.next_run(1, 256) == "leave"
