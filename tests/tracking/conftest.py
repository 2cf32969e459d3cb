"""The spool that tests of tracking deliver from, and processes that have imported MLflow."""

import multiprocessing
from multiprocessing import forkserver as server
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from support import processes
from support.tracked import spool_in

from ddpm.storage.locations import Location


@pytest.fixture
def buffer(tmp_path: Path) -> Location:
    return spool_in(tmp_path / "run")


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.forked", "mlflow.store.tracking.sqlalchemy_store"])
    with pytest.MonkeyPatch.context() as patch:  # it would ignore a module that it does not find
        patch.setenv(*processes.python_path(processes.REPO / "tests").popitem())
        server.ensure_running()
    return context
