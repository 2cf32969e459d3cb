"""A run's own curves: what was logged comes back, a resumed run continues them, a damaged file is one clear line."""

import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.local import finished

from ddpm.checkpoints import checkpoint
from ddpm.checkpoints.runs import Run
from ddpm.config import Config
from ddpm.config_io import override
from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.checkpoints import curves
from ddpm.checkpoints.curves import Point
from ddpm.tracking.metrics_buffer import Metrics
from ddpm.training import checkpoint_manager, run_state
from ddpm.training.state import State
from ddpm.training.store import RunStore
from ddpm.utils.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locations.resolve(str(tmp_path / "runs")).child("one")


def save(run: Location, config: Config, *positions: int) -> list[str]:
    """Resume, and store a checkpoint at each position, with a loss that tells when it was measured; warnings."""
    told: list[tuple[str, Any]] = []
    with finished(
        RunStore(config, Run("one", run, "a"), "b", lambda *subject: told.append(subject))
    ) as store:
        with store.latest_checkpoint() as folder:
            resumed_at = checkpoint.position(folder)
        for seen in positions:
            state = State.create(config, torch.device("cpu"))
            state.step, state.images_seen = seen // 32, seen
            store.metrics({"loss": float(seen + resumed_at), "odd": math.nan}, seen)
            store.save(state, best=False)
    return [line for subject, line in told if subject == run_state.WARNINGS]


def test_curves_that_a_failed_start_did_not_read_are_kept(tiny: Config, run: Location) -> None:
    save(run, tiny, 32)
    before = run.child(curves.FILE).read()
    with finished(RunStore(tiny, Run("one", run, "a"), "b")) as store:
        store.metrics({"loss": 1.0}, 0)
        store.flush_on_error()
    assert run.child(curves.FILE).read() == before


def test_a_resumed_run_replaces_the_points_beyond_its_checkpoint(tiny: Config, root_uri: str) -> None:
    run = locations.resolve(root_uri).child("one")
    assert curves.read(run) == {}
    tiny = override(tiny, {"train.keep_checkpoints": 9})
    assert save(run, tiny, 32, 64, 96) == []
    checkpoint_manager.remove(run.child(checkpoint.name_at(96)))  # as if killed before it was committed
    assert save(run, tiny, 96, 128) == []
    found = curves.read(run)
    assert list(found) == ["loss", "odd"]
    assert [point[:2] for point in found["loss"]] == [(32, 32), (64, 64), (96, 160), (128, 192)]
    assert [at for at, value, _ in found["odd"] if math.isnan(value)] == [32, 64, 96, 128]


def test_the_last_value_of_a_position_counts(run: Location) -> None:
    first = curves.extended(curves.SCHEMA.empty_table(), [Metrics({"b": 1.0, "a": 2.0}, 64, 1)])
    table = curves.extended(first, [Metrics({"a": 3.0}, 32, 2), Metrics({"a": math.inf}, 64, 3)])
    run.child(curves.FILE).write(curves.to_bytes(table))
    assert curves.read(run) == {"a": [Point(32, 3.0, 2), Point(64, math.inf, 3)], "b": [Point(64, 1.0, 1)]}
    assert pq.read_schema(Path(run.path, curves.FILE)).equals(curves.SCHEMA)


@pytest.mark.parametrize(
    "columns",
    [
        {"name": ["a"]},
        {"name": ["a"], "images_seen": [1], "value": ["much"], "timestamp_ms": [2]},
    ],
)
def test_a_file_with_other_columns_is_one_line(run: Location, columns: dict[str, Any]) -> None:
    file = Path(run.path, curves.FILE)
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), file)
    with pytest.raises(UserError, match=r"metrics\.parquet is damaged") as error:
        curves.read(run)
    assert "\n" not in str(error.value)


def test_flipped_bytes_are_noticed_or_change_nothing(run: Location) -> None:
    records = [Metrics({"loss": at / 7, "odd": math.inf}, at, at) for at in range(50)]
    whole = curves.to_bytes(curves.extended(curves.SCHEMA.empty_table(), records))
    file, rng, noticed = run.child(curves.FILE), random.Random(0), 0
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


def test_a_truncated_file_and_a_giant_are_refused(
    tiny: Config, run: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on with new curves."""
    file = Path(run.path, curves.FILE)
    assert save(run, tiny, 32) == []
    whole = file.read_bytes()
    monkeypatch.setattr(curves, "MAX_BYTES", len(whole) + 99)  # another time of day may be some bytes longer
    for data in (whole[:-9], b"PAR1", b"", whole + bytes(100)):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"is damaged|is larger than"):
            curves.read(run)
    (warning,) = save(run, tiny, 64)
    assert "metrics.parquet" in warning and "32 images" in warning
    assert [point[:2] for point in curves.read(run)["loss"]] == [(64, 96.0)]
