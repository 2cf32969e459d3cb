"""A writer of a run that wakes up beside its successor changes nothing that counts."""

import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support import processes
from support.faulted import TOTAL as TOTAL_OF_RUNS
from support.faulted import Run, assert_same, assert_tracked_once, only_error
from support.local import finished

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.runs import checkpoint, curves, generations, lock, names, run_folder, storage
from ddpm.runs.curves import CurveRow
from ddpm.runs.generations import Superseded
from ddpm.runs.run_folder import RunFolder
from ddpm.runs.storage import Location
from ddpm.training import checkpoint_manager
from ddpm.training.state import State
from ddpm.training.store import RunStore

TOTAL = 160
WORKER = "ray::RayTrainWorker"


class Gate:
    """Suspends the threads that pass it for the `at`-th time, until `open`."""

    def __init__(self, at: int) -> None:
        self.num_calls = 0
        self.is_reached = threading.Event()
        self._at = at
        self._open = threading.Event()
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.num_calls += 1
            is_here = self.num_calls >= self._at
        if is_here:
            self.is_reached.set()
            assert self._open.wait(60)

    def open(self) -> None:
        self._open.set()


def before_each_call(name: str) -> Callable[..., Any]:
    call = getattr(Location, name)

    def gated(self: "GatedLocation", *args: Any, **named: Any) -> Any:
        assert self.gate is not None
        self.gate()
        return call(self, *args, **named)

    return gated


@dataclass(frozen=True)
class GatedLocation(Location):
    """A location whose calls of storage pass a gate."""

    gate: Gate | None = None

    exists = before_each_call("exists")
    folders = before_each_call("folders")
    files = before_each_call("files")
    read = before_each_call("read")
    write = before_each_call("write")
    create = before_each_call("create")
    unlink = before_each_call("unlink")
    delete = before_each_call("delete")


class GatedFile:
    """A shared file whose calls pass a gate; not between the comparison and the swap, which are one step."""

    def __init__(self, file: Any, gate: Gate) -> None:
        self._file = file
        self._gate = gate

    def read(self) -> Any:
        self._gate()
        return self._file.read()

    def replace(self, version: Any, data: bytes | None) -> bool:
        self._gate()
        swapped: bool = self._file.replace(version, data)
        return swapped


@pytest.fixture(autouse=True)
def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare-and-swap and the last step of a checkpoint pass the gate of their location, too."""
    shared_file = generations.shared_file
    commit = checkpoint_manager._commit

    def gated_file(file: Location, **options: Any) -> Any:
        shared = shared_file(file, **options)
        return GatedFile(shared, file.gate) if isinstance(file, GatedLocation) and file.gate else shared

    def gated_commit(folder: Any, target: Location, retry: Any, *, move: bool) -> None:
        if isinstance(target, GatedLocation) and target.gate is not None:
            target.gate()
        commit(folder, target, retry, move=move)

    for module in (generations, run_folder):
        monkeypatch.setattr(module, "shared_file", gated_file)
    monkeypatch.setattr(checkpoint_manager, "_commit", gated_commit)


def train(run: Location, config: Config, driver: str | None = None) -> None:
    """Store a checkpoint, a picture and two points at each multiple of 32, from the newest checkpoint to the end."""
    store = RunStore(config, RunFolder("one", run, "a"), "b", driver=driver)
    with finished(store):
        with store.latest_checkpoint() as folder:
            seen = checkpoint.images_seen_at(folder)
        state = State.create(config, torch.device("cpu"))
        while seen < TOTAL:
            seen += 32
            state.step = seen // 32
            state.images_seen = seen
            store.metrics({"train/loss": 1 / seen, "train/lr": 0.1}, seen)
            store.save(state, best=True)
            store.check()


def start(run: Location, config: Config, gate: Gate) -> str:
    """`train` behind `gate`; returns the line of the error with which it ended, or an empty one.

    Its driver claims the run before, while it has the lock.
    """
    generations.Writer(run, "first", "first").claim()
    gated_run = GatedLocation(run.uri, run.filesystem, run.path, run.server, gate)
    try:
        train(gated_run, config, "first")
    except Superseded as error:
        return str(error)
    return ""


def rows(run: Location) -> list[CurveRow]:
    return curves.to_rows(curves.read_rows(run))


def content(run: Location) -> tuple[list[CurveRow], list[str], run_folder.Status | None]:
    """What counts in a run's folder; every checkpoint that counts is whole."""
    stored = run_folder.checkpoints(run)
    for location in stored:
        with names.as_folder(location) as folder:
            checkpoint.verify(folder)
    return rows(run), [location.uri for location in stored], run_folder.read_status(run)


def assert_one_writer(run: Location, config: Config, at: int) -> bool:
    """Suspend a writer before its `at`-th call of storage while another one finishes the run.

    Returns:
        Whether it has that many calls.
    """
    gate = Gate(at)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(start, run, config, gate)
        while not gate.is_reached.wait(0.005):
            if first.done():
                assert first.result() == ""
                return False
        seen_by_a_push = rows(run)
        train(run, config)
        found = content(run)
        gate.open()
        line = first.result()
    assert content(run) == found, f"call {at}"
    assert "\n" not in line
    points, stored, _ = found
    assert points[: len(seen_by_a_push)] == seen_by_a_push, f"call {at}: what MLflow had was not final"
    expected = [(name, seen) for seen in range(32, TOTAL + 1, 32) for name in ("train/loss", "train/lr")]
    assert [(row.name, row.images_seen) for row in points] == expected, f"call {at}"
    last = [run_folder.CheckpointName.parse(uri.rpartition("/")[2]) for uri in stored]
    assert [name.images_seen for name in last if name is not None][-2:] == [TOTAL - 32, TOTAL], f"call {at}"
    return True


@pytest.fixture
def config(tiny: Config) -> Config:
    return override(tiny, {"train.total_images": TOTAL, "train.keep_checkpoints": 2})


@pytest.mark.slow
def test_a_writer_suspended_at_any_moment_changes_nothing(config: Config, root_uri: str) -> None:
    """Before each call of storage on disk, and before some in a bucket."""
    root = storage.resolve(root_uri)
    calls = range(1, 1000) if root.is_local else sorted(random.Random(0).sample(range(1, 120), 10))
    num_suspended = 0
    for at in calls:
        if not assert_one_writer(root.child(f"run-{at}"), config, at):
            break
        num_suspended += 1
    assert num_suspended >= (80 if root.is_local else 8)


def as_of_another_machine(run: Location) -> None:
    """Let the holder of the run's lock count as a process of another machine, which nobody here can ask about."""
    file = run.child(lock.FILE)
    card = json.loads(file.read())
    file.write(json.dumps({**card, "process": "000000000000-1-1"}).encode())


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 10))])
def test_suspended_processes_wake_up_beside_their_successors(
    digits_uri: str, undisturbed: Run, root_uri: str, tmp_path: Path, moment: int
) -> None:
    """Driver and workers are suspended at a random moment; another driver takes over; then they go on. Weights, curves
    and MLflow are those of the undisturbed run."""
    first, second = (Run("frozen", root_uri, digits_uri, tmp_path / f"{i}.log") for i in (1, 2))
    with ExitStack() as stack:
        frozen = stack.enter_context(first.start())
        frozen.wait_for(first.past(0))
        time.sleep(random.Random(moment).uniform(0, 1.5))
        with processes.paused([psutil.Process(frozen.process.pid), *frozen.members(WORKER)]):
            as_of_another_machine(first.location)
            seen = first.images_seen()
            successor = stack.enter_context(second.start())
            successor.wait_for(second.past(min(seen, TOTAL_OF_RUNS - 1)))
        assert frozen.wait() == 1, frozen.output
        assert successor.wait() == 0, successor.output
    assert "taken over" in only_error(frozen)
    assert_same(second, undisturbed)
    assert_tracked_once(second)
