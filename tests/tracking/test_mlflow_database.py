"""A SQLite database of MLflow is whole or not there, whatever happens while it is made; one that is not is named.

What makes it is a process of its own each time, forked from one that has imported MLflow.
"""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.first_connections import connect, create_experiment
from support.tracked import address_at, assert_once, deliver, outbox_in, put

from ddpm.tracking import mlflow_client
from ddpm.tracking.mlflow_client import Lost
from ddpm.tracking.mlflow_runs import MlflowRun

NUM_KILLS = 4
NUM_AT_ONCE = 2
WHOLE_BYTES = 900_000
"""About what a new database takes (MLflow 3.17)."""


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServerContext]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.first_connections", "mlflow.store.tracking.sqlalchemy_store"])
    yield context


def stop_midway(
    forks: ForkServerContext, target: Callable[[str], None], database: Path, size: int, number: int
) -> bool:
    """Send the signal `number` to a process that runs target(URI of `database`), when it has written `size` bytes.

    Returns:
        Whether that stopped it; else it was done before the signal took effect.
    """
    before = set(database.parent.rglob(database.name))  # of processes that were stopped
    process = forks.Process(target=target, args=(f"sqlite:///{database}",))
    process.start()
    while process.is_alive() and bytes_in(set(database.parent.rglob(database.name)) - before) < size:
        time.sleep(0.005)
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, number)
    process.join()
    return process.exitcode != 0


def bytes_in(files: set[Path]) -> int:
    """How large the only file of `files` is; 0: there is none."""
    with suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in files if file.is_file())
    return 0


@pytest.mark.slow
def test_a_first_run_stopped_at_any_moment_leaves_no_broken_database(
    forks: ForkServerContext, tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    database, stopped = folder / "mlflow.db", 0
    for kill in range(NUM_KILLS):
        number = (signal.SIGKILL, signal.SIGINT)[kill % 2]
        size = 1 + kill * WHOLE_BYTES // (2 * NUM_KILLS)
        was_stopped = stop_midway(forks, connect, database, size, number)
        assert database.exists() != was_stopped
        stopped += was_stopped
        database.unlink(missing_ok=True)  # of one that was done before
    assert stopped >= NUM_KILLS // 2
    address, buffer = address_at(f"sqlite:///{database}"), outbox_in(tmp_path / "run")
    put(buffer, 64, 64)
    assert deliver(address, buffer, 64).undelivered == 0
    assert_once(address, 64)
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlruns"}  # nothing of the killed


@pytest.mark.slow
def test_first_runs_at_once_share_one_database(forks: ForkServerContext, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    uri = f"sqlite:///{folder}/mlflow.db"
    names = [str(i) for i in range(NUM_AT_ONCE)]
    started = [forks.Process(target=create_experiment, args=(uri, name)) for name in names]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * NUM_AT_ONCE
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
def test_a_half_made_database_is_named(tmp_path: Path, damage: str, trace: str) -> None:
    """The two kinds that an interrupted migration leaves: a table that was being rewritten, and one that is not
    noted down yet."""
    whole, database = mlflow_client.tracking_uri(), tmp_path / "half.db"
    mlflow_client.connect(whole)
    shutil.copy(whole.removeprefix("sqlite:///"), database)
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute(damage)
        opened.execute("UPDATE alembic_version SET version_num = 'bf29a5ff90ea'")  # not the newest
    with pytest.raises(Lost, match=trace) as caught:
        MlflowRun(address_at(f"sqlite:///{database}"), {}).open(running=True)
    said = str(caught.value)
    assert said.startswith(f"{database} is incomplete: ") and "\n" not in said
    assert "Move this file away" in said and "`python jobs/sync.py RUN`" in said


def test_another_error_is_not_taken_for_a_half_made_database(tmp_path: Path) -> None:
    database = tmp_path / "text.db"
    database.write_text("no database at all, and long enough to be read as one\n" * 20)
    with pytest.raises(Lost, match="file is not a database"):
        MlflowRun(address_at(f"sqlite:///{database}"), {}).open(running=True)
