"""A run's own curves: parts that are one table, each point recorded once, a damaged part is one clear line."""

import math
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.checkpoints import checkpoint_name
from support.local import finished

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.runs import checkpoint, curves, storage
from ddpm.runs.curves import CurveRow, Point
from ddpm.runs.run_folder import RunFolder
from ddpm.runs.storage import Location
from ddpm.training import checkpoint_manager, run_state, store
from ddpm.training.state import State
from ddpm.training.store import RunStore
from ddpm.utils.errors import UserError

ROWS: dict[str, list[Any]] = {"name": ["a"], "images_seen": [1], "value": [0.5], "timestamp_ms": [2]}


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return storage.resolve(str(tmp_path / "runs")).child("one")


def save(run: Location, config: Config, *positions: int) -> list[str]:
    """Resume, and store a checkpoint at each position, with a loss that tells when it was measured; warnings."""
    told: list[tuple[str, Any]] = []

    def notify(subject: str, value: Any) -> None:
        told.append((subject, value))

    with finished(RunStore(config, RunFolder("one", run, "a"), "b", notify)) as store:
        with store.latest_checkpoint() as folder:
            resumed_at = checkpoint.images_seen_at(folder)
        for seen in positions:
            state = State.create(config, torch.device("cpu"))
            state.step = seen // 32
            state.images_seen = seen
            store.metrics({"loss": float(seen + resumed_at), "odd": math.nan}, seen)
            store.save(state, best=False)
    return [line for subject, line in told if subject == run_state.WARNINGS]


def put(run: Location, first: int, *rows: CurveRow) -> None:
    """Write a part."""
    name, data = curves.part(first, list(rows), 1)
    run.child(name).write(data)


def rows(first: int, end: int) -> list[CurveRow]:
    return [CurveRow("loss", at, at / 7, at) for at in range(first, end)]


def parts(run: Location) -> list[str]:
    return run.child(curves.FOLDER).files()


def values(run: Location) -> list[tuple[int, float]]:
    return [(point.images_seen, point.value) for point in curves.read(run)["loss"]]


@pytest.fixture
def in_parts(root_uri: str) -> Location:
    """A run with the 30 points of `rows(0, 30)` in three parts, on disk and in a bucket."""
    run = storage.resolve(root_uri).child("one")
    for first in (0, 10, 20):
        put(run, first, *rows(first, first + 10))
    return run


def test_each_checkpoint_has_a_part_and_a_new_start_merges_them(tiny: Config, root_uri: str) -> None:
    run = storage.resolve(root_uri).child("one")
    assert curves.read(run) == {} and curves.num_rows(run) == 0
    assert save(run, tiny, 32, 64, 96) == []
    assert parts(run) == [f"{i:09d}-{i + 2:09d}-g1.parquet" for i in (0, 2, 4)]
    assert save(run, tiny, 128) == []
    assert parts(run) == ["000000000-000000006-g2.parquet", "000000006-000000008-g2.parquet"]
    assert list(curves.read(run)) == ["loss", "odd"]
    assert values(run) == [(32, 32), (64, 64), (96, 96), (128, 128 + 96)]
    assert [point.images_seen for point in curves.read(run)["odd"]] == [32, 64, 96, 128]
    assert save(run, tiny, 256) == []  # the end
    assert parts(run) == ["000000000-000000010-g3.parquet"]
    assert values(run)[-1] == (256, 256 + 128)


def test_a_point_that_is_measured_again_is_not_recorded_again(
    tiny: Config, root_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first value and its time are final, after a crash and if a checkpoint is damaged; also if the run is resumed
    with another interval of logging."""
    monkeypatch.setattr(store.time, "time", lambda: 1.0)
    run = storage.resolve(root_uri).child("one")
    tiny = override(tiny, {"train.keep_checkpoints": 9})
    save(run, tiny, 32, 64, 96)
    first = curves.read(run)["loss"]
    checkpoint_manager.remove(run.child(checkpoint_name(96)))  # as if killed before it was committed
    damaged = run.child(checkpoint_name(64)).child("ema.safetensors")
    damaged.write(bytes(100))
    monkeypatch.setattr(store.time, "time", lambda: 2.0)
    (warning,) = save(run, tiny, 48, 64, 80, 96, 128)
    assert damaged.uri in warning or "is not valid" in warning
    found = curves.read(run)["loss"]
    new = {at: Point(at, at + 32, 2000) for at in (48, 80, 128)}
    assert {point.images_seen: point for point in found} == {at.images_seen: at for at in first} | new
    table = curves.read_rows(run)
    assert len({(row["name"], row["images_seen"]) for row in table.to_pylist()}) == table.num_rows == 2 * 6


def test_a_failed_run_keeps_its_last_points(tiny: Config, run: Location) -> None:
    save(run, tiny, 32)
    with finished(RunStore(tiny, RunFolder("one", run, "a"), "b")) as store:
        with store.latest_checkpoint():
            store.metrics({"loss": 1.0}, 64)
        store.flush_on_error()
    assert values(run) == [(32, 32), (64, 1)]
    save(run, tiny, 64)
    assert values(run) == [(32, 32), (64, 1)]


def test_a_start_that_could_not_read_the_curves_writes_none(tiny: Config, run: Location) -> None:
    save(run, tiny, 32)
    with finished(RunStore(tiny, RunFolder("one", run, "a"), "b")) as store:
        store.metrics({"loss": 1.0}, 0)
        store.flush_on_error()
    assert values(run) == [(32, 32)] and len(parts(run)) == 1


def test_rows_are_read_from_any_number_on(in_parts: Location) -> None:
    for first in (0, 9, 10, 25, 30, 99):
        table = curves.read_rows(in_parts, first)
        assert table.column("images_seen").to_pylist() == list(range(first, 30))
    assert curves.num_rows(in_parts) == 30


def test_a_merge_that_was_killed_doubles_nothing(in_parts: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any of its steps: before the merged part is there, and before each removal."""
    steps = 0

    def killed_at(step: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                raise KeyboardInterrupt
            return call(*args, **named)

        return counted

    for step in (1, 2, 3, 4):
        steps = 0
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Location, "create", killed_at(step, Location.create))
            patch.setattr(Location, "unlink", killed_at(step, Location.unlink))
            curves.merge(in_parts, 2, pytest.fail)
        assert curves.read_rows(in_parts).column("images_seen").to_pylist() == list(range(30)), step
        assert curves.num_rows(in_parts) == 30
        assert curves.merge(in_parts, 2, pytest.fail).num_rows == 30
        assert parts(in_parts) == ["000000000-000000030-g2.parquet"], (
            step
        )  # for pandas, which reads every file
        in_parts.child(curves.FOLDER).delete()
        for first in (0, 10, 20):
            put(in_parts, first, *rows(first, first + 10))
    for _ in range(2):
        assert curves.merge(in_parts, 2, pytest.fail).num_rows == 30
        assert parts(in_parts) == ["000000000-000000030-g2.parquet"]


def test_a_reader_finds_all_rows_while_parts_are_merged(run: Location, tmp_path: Path) -> None:
    for at in range(40):
        put(run, at, *rows(at, at + 1))
    kept = tmp_path / "kept"
    num_read = list[int]()
    is_done = threading.Event()
    shutil.copytree(run.path, kept)

    def read() -> None:
        while not is_done.is_set():
            num_read.append(curves.read_rows(run).num_rows)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        curves.merge(run, 2, pytest.fail)
        for file in (kept / curves.FOLDER).iterdir():
            storage.resolve(f"{run.path}/{curves.FOLDER}/{file.name}").write(file.read_bytes())
    is_done.set()
    reader.join()
    assert len(num_read) > 3 and set(num_read) == {40}


def test_a_hundred_thousand_points(run: Location) -> None:
    for first in range(0, 100_000, 1000):
        put(run, first, *rows(first, first + 1000))
    assert curves.merge(run, 2, pytest.fail).num_rows == 100_000
    assert len(parts(run)) == 1
    found = curves.read(run)["loss"]
    assert found[0] == Point(0, 0.0, 0) and found[-1] == Point(99_999, 99_999 / 7, 99_999)
    assert curves.read_rows(run, 99_990).num_rows == 10


@pytest.mark.parametrize(
    "columns",
    [
        {"name": ["a"]},
        ROWS | {"value": ["much"]},
        ROWS | {"images_seen": [None]},
        ROWS | {"value": pa.array([None], pa.float64())},
    ],
    ids=["columns missing", "text", "null of another type", "null"],
)
def test_a_damaged_part_is_one_line(run: Location, columns: dict[str, Any]) -> None:
    """It is left out where that is asked for, and the others are read."""
    put(run, 0, *rows(0, 3))
    put(run, 4, *rows(4, 6))
    name, _ = curves.part(3, rows(3, 4), 1)
    pq.write_table(pa.table(columns), Path(run.path, name))
    with pytest.raises(UserError, match=rf"{name} is damaged: ") as error:
        curves.read(run)
    assert "\n" not in str(error.value)
    lines = list[str]()
    table = curves.read_rows(run, 1, lines.append)
    assert table.column("images_seen").to_pylist() == [1, 2, 4, 5]
    assert len(lines) == 1 and name in lines[0]
    curves.merge(run, 2, lines.append)
    assert len(parts(run)) == 3 and curves.num_rows(run) == 6


def test_flipped_bytes_are_noticed_or_change_nothing(run: Location) -> None:
    name, whole = curves.part(0, [*rows(0, 50), CurveRow("odd", 1, math.inf, 1)], 1)
    file = run.child(name)
    rng = random.Random(0)
    noticed = 0
    file.write(whole)
    truth = curves.read(run)
    for _ in range(300):
        broken = bytearray(whole)
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        file.write(bytes(broken))
        try:
            assert curves.read(run) == truth
        except UserError as error:
            noticed += "is damaged" in str(error)
    assert noticed > 100


def test_a_truncated_file_a_device_and_a_giant_are_refused(
    tiny: Config, run: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on, and only the points in them are lost."""
    assert save(run, tiny, 32, 64) == []
    file = Path(run.path, curves.FOLDER, parts(run)[0])
    whole = file.read_bytes()
    monkeypatch.setattr(curves, "MAX_BYTES", len(whole) + 99)  # another time of day may be some bytes longer
    for data in (whole[:-9], b"PAR1", b"", whole + bytes(100)):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"is damaged|is larger than"):
            curves.read(run)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"metrics is damaged: it lacks the rows 0-1"):
        curves.read(run)
    for at in (96, 128):
        (warning,) = save(run, tiny, at)
        assert "is damaged" in warning
    table = curves.read_rows(run, 0, str)
    assert table.column("images_seen").to_pylist() == [64, 64, 96, 96, 128, 128]
    assert curves.read_rows(run, 6, str).column("images_seen").to_pylist() == [128, 128]
