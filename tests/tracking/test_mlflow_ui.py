"""MLflow's pages of three runs with different schedules, in a real browser."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from support import processes, tracked
from support.servers import free_ports

from ddpm.checkpoints.curves import Row
from ddpm.checkpoints.runs import SAMPLES, StatusName
from ddpm.config_io import override
from ddpm.presets import DIGITS
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.mlflow_pages import GRID, WORKFLOW
from ddpm.tracking.push import push

PATIENCE_MS = 300_000
TOTALS = {"linear": 1280, "sigmoid": 2560, "cosine": 2560}
PICTURES = ("pictures/reverse_trajectory.png", "pictures/forward_noising.png")
PANEL = "[data-component-id='mlflow.assistant.chat_panel.close']"
CARD = "[data-testid='experiment-view-compare-runs-card']"

pytestmark = pytest.mark.slow


def push_run(storage: Path, name: str, until: int, status: StatusName = "FINISHED", **changes: Any) -> Run:
    """Push what a run of the preset digits records until it has seen `until` images."""
    settings = {"run.experiment": "schedules", "train.sample_every_images": 1280, **changes}
    config = override(DIGITS, settings)
    run = tracked.begin(storage, name, config)
    rows = []
    for seen in range(256, until + 1, 256):
        rows.append(Row("train/loss", seen, 64 / seen, seen))
        rows.append(Row("train/images_per_s", seen, 900.0, seen))
    rows.append(Row("held_out/bits_per_dim", until, 4.5, until))
    tracked.append(run, rows)
    tracked.store(run, until, config)
    for seen in range(1280, until + 1, 1280):
        tracked.draw(run, SAMPLES, seen)
    for picture in PICTURES:
        run.location.child(picture).write(tracked.PICTURE)
    tracked.set_status(run, status, until)
    push(run)
    return tracked.run_with_key(tracking_uri(), run.key)


@pytest.fixture(scope="session")
def runs(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs pushed to the server, by schedule; one is shorter than the others."""
    found, storage = {}, tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        for kind, total in TOTALS.items():
            changes = {"schedule.kind": kind, "train.total_images": total}
            found[kind] = push_run(storage, kind, total, **changes)
    return found


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """A browser page, wide enough for MLflow's side panel; a screenshot is saved at the end."""
    page = browser.new_page(viewport={"width": 2200, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.close()


@pytest.fixture
def cosine(page: Any, mlflow_server: str, runs: dict[str, Run]) -> Any:
    """The page of the run with the cosine schedule."""
    page.goto(f"{mlflow_server}/#/{run_path(runs['cosine'])}?{WORKFLOW}")
    page.get_by_role("heading", name="cosine").wait_for()
    return page


def run_path(run: Run) -> str:
    return f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def test_the_overview_describes_the_run(cosine: Any) -> None:
    cosine.get_by_text("Finished").first.wait_for()
    cosine.get_by_text("jobs/train.py").first.wait_for()
    cosine.get_by_text("predicts eps, cosine schedule of 500 steps").first.wait_for()
    cosine.get_by_text("Finished at 2,560 of 2,560 images; bits/dim").first.wait_for()
    cosine.get_by_text("digits (").first.wait_for()  # the data set's name
    cosine.get_by_text("train.total_images").first.wait_for()
    cosine.get_by_text("schedule.cosine_s").first.wait_for()
    assert not cosine.get_by_text("sigmoid_tau").count()
    cosine.get_by_role("link", name="train/loss", exact=True).wait_for()  # an error if there are two
    assert shown_size(cosine.locator("img[src^='get-artifact']").first)[0] > 0


def test_the_charts_show_the_loss(cosine: Any) -> None:
    cosine.get_by_role("tab", name="Model metrics").click()
    cosine.get_by_placeholder("Search metric charts").fill("train/loss")
    legend = cosine.get_by_text("cosine (train/loss)")
    legend.wait_for()
    chart = cosine.locator(CARD, has=legend)
    assert chart.count() == 1
    chart.scroll_into_view_if_needed()
    plot = chart.locator(".js-plotly-plot").first
    plot.locator("path.js-line").first.wait_for(state="attached")
    # The data's points, not the drawn path's: Plotly leaves out points on a straight line.
    assert plot.evaluate("plot => plot.data[0].x.length") == 10  # one point per 256 images


def test_compare_shows_the_newest_grids_side_by_side(
    page: Any, mlflow_server: str, runs: dict[str, Run]
) -> None:
    ids = json.dumps([run.info.run_id for run in runs.values()])
    experiments = json.dumps([runs["linear"].info.experiment_id])
    page.goto(f"{mlflow_server}/#/compare-runs?runs={ids}&experiments={experiments}&{WORKFLOW}")
    page.locator(PANEL).click()  # close the panel: it leaves no room for the file names
    page.get_by_text(GRID, exact=True).click()
    shown = page.locator("img[src^='blob:']:visible")
    page.wait_for_function(
        "new Set([...document.querySelectorAll(\"img[src^='blob:']\")].map(i => i.src)).size == 3"
    )
    assert all(shown_size(shown.nth(i))[0] > 0 for i in range(shown.count()))


@pytest.mark.parametrize("name", [GRID, *PICTURES])
def test_the_artifact_browser_shows_the_images(
    cosine: Any, runs: dict[str, Run], mlflow_server: str, name: str
) -> None:
    cosine.get_by_role("tab", name="Artifacts").click()
    for part in name.split("/"):
        cosine.get_by_text(part, exact=True).click()
    ours = MlflowClient(mlflow_server).download_artifacts(runs["cosine"].info.run_id, name, ".")
    with Image.open(ours) as image:
        assert shown_size(cosine.locator("img[src^='blob:']").first) == list(image.size)


def test_a_stopped_run_does_not_look_like_one_that_failed(page: Any, database: Path, tmp_path: Path) -> None:
    """jobs/ui.py prints the link to the experiment, from which one comes to the run."""
    (port,) = free_ports(1)
    push_run(tmp_path, "a-run", 256, "STOPPED", **{"run.experiment": "stops"})
    env = {"MLFLOW_TRACKING_URI": tracking_uri()}
    with processes.Job("ui", "--port", port, log=tmp_path / "ui.log", env=env) as job:
        job.wait_for(lambda: "Uvicorn running" in job.output)
        (link,) = re.findall(r"^stops +(http://\S+)$", job.output, re.MULTILINE)
        page.goto(link)
        page.get_by_role("link", name="a-run").first.click()
        page.get_by_text("Stopped at 256 of 144,000 images").first.wait_for()
        page.get_by_text("Resume: ").first.wait_for()
        page.get_by_text("Scheduled").first.wait_for()
        assert not page.get_by_text("Killed").count() + page.get_by_text("Failed").count()
        programs = [" ".join(child.cmdline()) for child in psutil.Process(job.process.pid).children(True)]
        assert programs and not any("mlflow.server.jobs" in program for program in programs), programs


def shown_size(image: Any) -> list[int]:
    """Width and height of an image on the page, once the browser has fetched and decoded it."""
    image.wait_for()
    return image.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
