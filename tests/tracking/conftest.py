"""MLflow's databases, and processes that have imported MLflow."""

import multiprocessing
import shutil
from multiprocessing import forkserver as server
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from support import processes

from ddpm.tracking.mlflow_client import Connection


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables; creating one takes seconds."""
    database = tmp_path_factory.mktemp("empty") / "mlflow.db"
    Connection(f"sqlite:///{database}")
    return database


@pytest.fixture
def database(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty database of this test alone, set as MLFLOW_TRACKING_URI."""
    database = tmp_path / "mlflow" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(empty_database, database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    return database


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.forked", "mlflow.store.tracking.sqlalchemy_store"])
    with pytest.MonkeyPatch.context() as patch:  # it would ignore a module that it does not find
        patch.setenv(*processes.python_path(processes.REPO / "tests").popitem())
        server.ensure_running()
    return context
