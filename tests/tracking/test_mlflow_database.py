"""MLflow's SQLite database is created completely or not at all; a half-made one is reported with its path.

Each attempt runs in a separate process, forked from one that has imported MLflow.
"""

import os
import shutil
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
from support.processes import wait_for
from support.tracked import address_at, assert_delivered_once, deliver, names_in, put, warnings_of

from ddpm.storage.locations import Location
from ddpm.tracking import mlflow_client
from ddpm.tracking.mlflow_client import Lost
from ddpm.tracking.mlflow_runs import MlflowRun
from ddpm.tracking.uploader import Uploader

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
    forkserver: ForkServerContext, buffer: Location, tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    database, stopped = folder / "mlflow.db", 0
    for kill in range(NUM_KILLS):
        number = (signal.SIGKILL, signal.SIGINT)[kill % 2]
        size = 1 + kill * DATABASE_BYTES // (2 * NUM_KILLS)
        was_stopped = kill_midway(forkserver, connect, database, size, number)
        assert database.exists() != was_stopped
        stopped += was_stopped
        database.unlink(missing_ok=True)  # from a process that finished before the signal
    assert stopped >= NUM_KILLS // 2
    address = address_at(f"sqlite:///{database}")
    put(buffer, 64, 64)
    assert deliver(address, buffer, 64).undelivered == 0
    assert_delivered_once(address, 64)
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlruns"}  # no leftovers


@pytest.mark.slow
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
def test_a_half_made_database_is_reported_with_its_path(tmp_path: Path, damage: str, trace: str) -> None:
    """The two states that an interrupted migration leaves: a temporary table, and a table that the schema version
    does not include yet."""
    whole, database = mlflow_client.tracking_uri(), tmp_path / "half.db"
    mlflow_client.connect(whole)
    shutil.copy(whole.removeprefix("sqlite:///"), database)
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute(damage)
        opened.execute("UPDATE alembic_version SET version_num = 'bf29a5ff90ea'")  # an old schema version
    with pytest.raises(Lost, match=trace) as caught:
        MlflowRun(address_at(f"sqlite:///{database}"), {}).open(running=True)
    message = str(caught.value)
    assert message.startswith(f"{database} is incomplete: ") and "\n" not in message
    assert "Move this file away" in message and "`python jobs/sync.py RUN`" in message


def test_other_database_errors_are_not_reported_as_half_made(tmp_path: Path) -> None:
    database = tmp_path / "text.db"
    database.write_text("no database at all, and long enough to be read as one\n" * 20)
    with pytest.raises(Lost, match="file is not a database"):
        MlflowRun(address_at(f"sqlite:///{database}"), {}).open(running=True)


def test_a_database_that_is_locked_at_the_first_connection_is_waited_for(
    forkserver: ForkServerContext, buffer: Location, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As by another `mlflow ui` that migrates it, or by a backup."""
    database = tmp_path / "mlflow.db"
    # In another process, since this one must not know the database.
    process = forkserver.Process(target=connect, args=(f"sqlite:///{database}",))
    process.start()
    process.join()
    address = address_at(f"sqlite:///{database}")
    put(buffer, 64, 64)
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        uploader = Uploader(address, {}, buffer)
        uploader.begin()
        wait_for(lambda: warnings_of(caplog))
    uploader.committed(64)
    assert uploader.close("FINISHED").undelivered == 0
    (line,) = warnings_of(caplog)
    assert line.endswith(
        "is not accepting data (OSError: (sqlite3.OperationalError) database is locked); retrying"
    )
    assert_delivered_once(address, 64)


def test_a_database_deleted_while_training_is_one_line(
    buffer: Location, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is left is delivered to another database by jobs/sync.py."""
    whole, database = mlflow_client.tracking_uri(), tmp_path / "mlflow.db"
    mlflow_client.connect(whole)
    shutil.copy(whole.removeprefix("sqlite:///"), database)
    address = address_at(f"sqlite:///{database}")
    put(buffer, 64, 64)
    uploader = Uploader(address, {}, buffer)
    uploader.begin()
    uploader.committed(64)
    wait_for(lambda: not names_in(buffer))
    database.unlink()
    put(buffer, 128, 128)
    uploader.committed(128)
    delivery = uploader.close("FINISHED")
    assert (delivery.undelivered, names_in(buffer)) == (2, ["000000000128.zip"])
    stopped, left = warnings_of(caplog)
    assert stopped == (
        f"tracking has stopped, training continues, records are kept in {buffer.uri}: {database} was deleted"
    )
    assert "did not accept everything (2 records left)" in left
    output = capfd.readouterr()
    assert "Traceback" not in output.out + output.err + caplog.text
