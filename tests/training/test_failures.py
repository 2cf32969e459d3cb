"""The restart policy: what follows for a run whose processes failed or left."""

from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.training import run_state
from ddpm.training.failures import CONTROLLER, STATE, Done, Fail, Restart, TrainingFailed, decide, is_idle
from ddpm.training.loop import NonFinite
from ddpm.training.run_state import MORE_WORKERS, PREEMPTION

CONFIG = override(
    Config(), {"train.total_images": 640, "cluster.max_failures": 3, "cluster.max_preemptions": 2}
)
KILLED = OutOfMemoryError(
    "2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 2d92) was "
    "22.40GB used / 23.54GB limit (0.951)\nOOM kill reason: Memory usage 1B exceeded threshold of 2B\n"
    "Ray killed 2 worker(s) based on the killing policy\nConsidered workers: [\n"
    "Selected to kill: (Actor(7b): job ID=01, task name=RayTrainWorker.__init__, required resources={CPU: 1}, pid=1, "
    "actual memory used=9.14GB, worker ID=18)\n"
    "Selected to kill: (Task: job ID=01, task name=read, required resources={}, pid=2, actual memory used=0.06GB)\n]\n"
    f"Top 10 memory users: PID\tMEM(GB)\tCOMMAND\nRefer to the documentation {'of Ray ' * 200}"
)
MEMORY = (
    "out of memory: 22.40GB of 23.54GB on 10.0.0.7 were in use, so Ray killed RayTrainWorker (9.14GB), read (0.06GB); "
    "lower --train.forward-images, --data.window-rows or --cluster.num-workers"
)


class Preempted(ActorDiedError):
    preempted = True


class Wrapped(Exception):
    """As Ray Train wraps the death of a worker."""

    def __init__(self, death: Exception) -> None:
        self.health_check_failure = death


@pytest.mark.parametrize(
    ("values", "stop_requested", "expected"),
    [
        ({"ended": 640}, False, Done(640)),
        ({"ended": 320}, True, Done(320)),
        ({}, True, Done(None)),  # stopped before the first step
        (
            {"progress": 1, "begun": None, "committed": 64},
            True,
            Done(None),
        ),  # stopped while it waits for nodes
        ({"ended": -1, "failure": (error := NonFinite("loss is nan"))}, False, Fail(error)),
    ],
)
@pytest.mark.parametrize("died", [{}, {CONTROLLER: ActorDiedError()}, {STATE: ActorDiedError()}])
def test_a_run_that_has_ended_is_not_restarted(
    died: dict[str, Exception], values: dict[str, Any], stop_requested: bool, expected: Any
) -> None:
    assert decide(died, values, CONFIG, stop_requested) == expected


RESUMES = "failed; resuming from the last checkpoint: "
STOPPED = {"ended": 64, "stop": PREEMPTION}


@pytest.mark.parametrize(
    ("died", "values", "line", "counted"),
    [
        ({STATE: ActorDiedError()}, {}, f"{STATE} {RESUMES}", {"failures": (1, -1)}),
        # Rank 0 and Ray Train's controller have noticed it, too.
        (
            {STATE: ActorDiedError(), CONTROLLER: ControllerError(ActorDiedError())},
            {"committed": 64, "failures": (1, 64)},
            f"{STATE} {RESUMES}",
            {"failures": (2, 64)},
        ),
        (
            {},
            {"ended": 64, "stop": MORE_WORKERS},
            "nodes have joined; continuing with more workers, at 64 ",
            {},
        ),
        ({}, STOPPED, "a node is about to be preempted", {"preemptions": 1}),
        # The death is the cause, and the node's preemption is no failure, also after rank 0 has left.
        (
            {"worker 0": ValueError("gloo"), "worker 1": Wrapped(Preempted())},
            {**STOPPED, "preemptions": 1},
            f"worker 1 {RESUMES}",
            {"preemptions": 2},
        ),
        ({CONTROLLER: ActorDiedError()}, {}, f"{CONTROLLER} {RESUMES}", {"failures": (1, -1)}),
        ({CONTROLLER: KILLED}, {}, f"{CONTROLLER} {RESUMES}{MEMORY}", {"failures": (1, -1)}),
        ({CONTROLLER: ControllerError(KILLED)}, {}, f"{CONTROLLER} {RESUMES}{MEMORY}", {"failures": (1, -1)}),
        (
            {"worker 0": ValueError("gloo"), "worker 1": Wrapped(KILLED)},
            {"committed": 64, "failures": (2, 64)},
            f"worker 1 {RESUMES}{MEMORY}",
            {"failures": (3, 64)},
        ),
        # A new checkpoint ends the row of failures.
        (
            {"worker 0": ValueError("bug")},
            {"committed": 128, "failures": (3, 64)},
            f"worker 0 {RESUMES}bug",
            {"failures": (1, 128)},
        ),
    ],
)
def test_new_workers_resume(
    died: dict[str, Exception], values: dict[str, Any], line: str, counted: dict[str, Any]
) -> None:
    restart = decide(died, values, CONFIG)
    assert isinstance(restart, Restart) and restart.line.startswith(line)
    # Else the new group would leave as well, or a later signal end the run where the old one left.
    left = {run_state.STOP: None, run_state.ENDED: None} if "stop" in values else {}
    assert restart.values == {run_state.WORKERS: None, run_state.STEPPING: None, **left, **counted}


@pytest.mark.parametrize(
    ("died", "values", "line"),
    [
        (
            {CONTROLLER: KILLED},
            {"failures": (3, -1)},
            f"training failed: {MEMORY} (4 times",
        ),
        (
            {"worker 1": Wrapped(KILLED)},
            {"committed": 64, "failures": (3, 64)},
            f"training failed: {MEMORY} (4 times",
        ),
        ({STATE: ActorDiedError()}, {"failures": (3, -1)}, "training failed: "),
        (
            {CONTROLLER: ValueError("no such resource\nin Ray Some common causes include: a, b")},
            {},
            "training failed: in Ray (--verbose",
        ),
        ({}, {**STOPPED, "preemptions": 2}, "nodes were preempted more than 2 times"),
        ({"worker 0": Wrapped(Preempted())}, {"preemptions": 2}, "nodes were preempted more than 2 times"),
    ],
)
def test_a_run_ends_after_too_many_failures(
    died: dict[str, Exception], values: dict[str, Any], line: str
) -> None:
    fail = decide(died, values, CONFIG)
    assert isinstance(fail, Fail) and isinstance(fail.error, TrainingFailed)
    assert str(fail.error).startswith(line) and len(str(fail.error)) < 500 and "\n" not in str(fail.error)


@pytest.mark.parametrize(
    ("stop", "begins"), [(None, True), (PREEMPTION, True), (MORE_WORKERS, True), ("SIGTERM", False)]
)
def test_either_the_workers_begin_or_the_driver_may_leave(stop: str | None, begins: bool) -> None:
    state = run_state.RunState({run_state.STOP: stop})
    assert state.begin() == begins
    assert is_idle(state.snapshot()) != begins
