"""The links that a run and jobs/ui.py print open MLflow's pages, and these show the run: in a real browser."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import processes, tracked
from support.servers import LOOPBACK, free_ports

from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.runs.run_folder import SAMPLES, RunStatus
from ddpm.tracking import mlflow_pages
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.push import Pushed, push

PATIENCE_MS = 300_000

pytestmark = pytest.mark.slow


def push_run(storage: Path, until: int, status: RunStatus, **changes: Any) -> Pushed:
    """Push what a run of the preset digits records until it has seen `until` images."""
    config = override(DIGITS, changes)
    run = tracked.begin(storage, config=config)
    tracked.store(run, until, config)
    tracked.draw(run, SAMPLES, until)
    tracked.set_status(run, status, until)
    return push(run)


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A browser page; a screenshot is saved at the end."""
    page = browser.new_page(viewport={"width": 2200, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.close()


def test_the_link_of_a_run_opens_its_description(
    page: Any, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    changes = {"schedule.kind": "cosine", "train.total_images": 2560}
    pushed = push_run(tmp_path, 2560, RunStatus.FINISHED, **changes)
    page.goto(mlflow_pages.link(mlflow_server, pushed.experiment_id, pushed.run_id))
    page.get_by_role("heading", name="a-run").first.wait_for()
    page.get_by_text("predicts eps, cosine schedule of 500 steps").first.wait_for()
    page.get_by_text("Finished at 2,560 of 2,560 images").first.wait_for()
    grid = page.locator("img[src^='get-artifact']").first  # as the description names it
    grid.wait_for()
    size = "image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
    assert grid.evaluate(size) == [12, 8]


def test_the_link_of_an_experiment_leads_to_a_stopped_run(page: Any, database: Path, tmp_path: Path) -> None:
    """Its page does not look like that of a run that failed."""
    (port,) = free_ports(1)
    push_run(tmp_path, 256, RunStatus.STOPPED, **{"run.experiment": "stops"})
    env = {"MLFLOW_TRACKING_URI": tracking_uri()}
    with processes.Job("ui", "--port", port, log=tmp_path / "ui.log", env=env) as job:
        job.wait_for(lambda: "Uvicorn running" in job.output)
        (link,) = re.findall(r"^stops +(http://\S+)$", job.output, re.MULTILINE)
        page.goto(link)
        page.get_by_role("link", name="a-run").first.click()
        page.get_by_text("Stopped at 256 of 144,000 images").first.wait_for()
        page.get_by_text("Resume: ").first.wait_for()
        assert not page.get_by_text("Killed").count() + page.get_by_text("Failed").count()


@pytest.mark.parametrize("sign", ["http://", "Uvicorn running"], ids=["while it starts", "while it serves"])
def test_ctrl_c_ends_the_pages_without_a_traceback(database: Path, tmp_path: Path, sign: str) -> None:
    """A terminal sends SIGINT to all processes of its foreground group."""
    (port,) = free_ports(1)
    env = {"MLFLOW_TRACKING_URI": tracking_uri()}
    with processes.Job("ui", "--port", port, log=tmp_path / "ui.log", env=env) as job:
        job.wait_for(lambda: sign in job.output)
        os.killpg(job.process.pid, signal.SIGINT)
        assert job.wait() == 128 + signal.SIGINT, job.output
    assert "Traceback" not in job.output
    with socket.socket() as taken:
        taken.bind((LOOPBACK, port))  # nobody listens there any more
