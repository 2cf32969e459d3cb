"""MLflow's SQLite database is created completely or not at all; a half-made one is reported with its path.

Each attempt runs in a separate process, forked from one that has imported MLflow.
"""

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.forked import connect, create_experiment
from support.tracked import content, write_run

from ddpm.tracking.mlflow_client import Connection, MlflowError, tracking_uri
from ddpm.tracking.push import push

NUM_KILLS = 4
NUM_CONCURRENT = 2
DATABASE_BYTES = 900_000
"""Approximate size of a new database (MLflow 3.17)."""


def kill_midway(
    forkserver: ForkServerContext, target: Callable[[str], None], database: Path, size: int, number: int
) -> bool:
    """Run target(URI of `database`) in a process, and send it the signal `number` once it has written `size` bytes.

    Returns:
        Whether the signal stopped it; otherwise it finished before.
    """
    before = set(database.parent.rglob(database.name))  # files left by earlier, killed processes
    process = forkserver.Process(target=target, args=(f"sqlite:///{database}",))
    process.start()
    while process.is_alive() and size_of(set(database.parent.rglob(database.name)) - before) < size:
        time.sleep(0.005)
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, number)
    process.join()
    return process.exitcode != 0


def size_of(files: set[Path]) -> int:
    """Total size of `files`; 0 if there are none."""
    with suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in files if file.is_file())
    return 0


@pytest.mark.slow
def test_killing_the_first_run_at_any_point_leaves_no_half_made_database(
    forkserver: ForkServerContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    database = folder / "mlflow.db"
    stopped = 0
    for kill in range(NUM_KILLS):
        number = (signal.SIGKILL, signal.SIGINT)[kill % 2]
        size = 1 + kill * DATABASE_BYTES // (2 * NUM_KILLS)
        was_stopped = kill_midway(forkserver, connect, database, size, number)
        assert database.exists() != was_stopped
        stopped += was_stopped
        database.unlink(missing_ok=True)  # from a process that finished before the signal
    assert stopped >= NUM_KILLS // 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    run = write_run(tmp_path)
    push(run)
    assert content(tracking_uri(), run)["status"] == "FINISHED"
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlruns"}  # no leftovers


@pytest.mark.slow
@pytest.mark.lowest
def test_concurrent_first_runs_share_one_database(forkserver: ForkServerContext, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    uri = f"sqlite:///{folder}/mlflow.db"
    names = [str(i) for i in range(NUM_CONCURRENT)]
    started = [forkserver.Process(target=create_experiment, args=(uri, name)) for name in names]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * NUM_CONCURRENT
    assert {e.name for e in MlflowClient(uri).search_experiments()} == {"Default", *names}
    assert [path.name for path in folder.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize(
    ("damage", "trace"),
    [
        (
            "CREATE TABLE _alembic_tmp_experiments (experiment_id INTEGER)",
            "table _alembic_tmp_experiments is left over",
        ),
        ("DROP TABLE entity_associations", "table secrets already exists"),
    ],
)
def test_a_half_made_database_is_reported_with_its_path(database: Path, damage: str, trace: str) -> None:
    """The two states that an interrupted migration leaves: a temporary table, and a table that the schema version
    does not include yet."""
    half = database.rename(database.with_name("half.db"))
    with closing(sqlite3.connect(half)) as opened, opened:
        opened.execute(damage)
        opened.execute("UPDATE alembic_version SET version_num = 'bf29a5ff90ea'")  # an old schema version
    with pytest.raises(MlflowError, match=trace) as caught:
        Connection(f"sqlite:///{half}")
    message = str(caught.value)
    assert not caught.value.is_temporary
    assert str(half) in message and "\n" not in message


def test_other_database_errors_are_not_reported_as_half_made(tmp_path: Path) -> None:
    database = tmp_path / "text.db"
    database.write_text("no database at all, and long enough to be read as one\n" * 20)
    with pytest.raises(MlflowError, match="file is not a database"):
        Connection(f"sqlite:///{database}")
