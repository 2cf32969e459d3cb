"""What a person sees of a run in MLflow's pages, in a real browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

PATIENCE_MS = 60_000
SHORT = {
    "train.total-images": 2560,
    "train.log-every-images": 256,
    "train.checkpoint-every-images": 1280,
    "train.sample-every-images": 1280,
    "sample.num-sample-steps": 10,
    "run.name": "seen",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short run of digits, tracked by the server."""
    flags = SHORT | {"run.storage": tmp_path_factory.mktemp("runs")}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = processes.run_job("train", "digits", *words, env={"MLFLOW_TRACKING_URI": mlflow_server})
    assert done.returncode == 0, done.stderr
    assert "MLflow      run " in done.stdout
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("ddpm")
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'seen'")
    return run


@pytest.fixture
def page(browser: Any, mlflow_server: str, run: Run, tmp_path: Path) -> Iterator[Any]:
    """The run's page; what it showed last is kept as a picture."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{mlflow_server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}")
    page.get_by_role("heading", name="seen").wait_for()
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.close()


def test_the_overview_shows_name_status_and_config(page: Any) -> None:
    page.get_by_text("Finished").first.wait_for()
    page.get_by_text("jobs/train.py").first.wait_for()
    page.get_by_text("train.total_images").first.wait_for()
    assert page.get_by_role("link", name="train/loss", exact=True).count() == 1


def test_the_charts_show_the_loss(page: Any) -> None:
    page.get_by_role("tab", name="Model metrics").click()
    page.get_by_placeholder("Search metric charts").fill("train/loss")
    legend = page.get_by_text("seen (train/loss)")
    legend.wait_for()
    chart = page.locator("[data-testid='experiment-view-compare-runs-card']", has=legend)
    assert chart.count() == 1
    chart.scroll_into_view_if_needed()
    plot = chart.locator(".js-plotly-plot").first
    plot.locator("path.js-line").first.wait_for(state="attached")
    # Not the path's points: Plotly leaves out those on a straight line.
    assert plot.evaluate("plot => plot.data[0].x.length") == 10  # a point each 256 images


def test_the_image_panel_shows_the_last_samples(page: Any) -> None:
    page.get_by_role("tab", name="Model metrics").click()
    page.get_by_placeholder("Search metric charts").fill("samples")
    panel = page.locator("[data-testid='experiment-view-compare-runs-card']").filter(has_text="samples").last
    panel.get_by_role("spinbutton").fill(str(SHORT["train.total-images"]))
    panel.get_by_role("spinbutton").press("Enter")
    panel.get_by_role("button").first.click()  # full screen: in the card, the parameters hide the image
    width, height = shown_size(page.locator("img[src*='samples%2Bstep%2B2560']").first)
    assert width > 0
    assert height > 0


@pytest.mark.parametrize("name", ["samples.png", "reverse_trajectory.png", "forward_noising.png"])
def test_the_artifacts_show_the_pictures(page: Any, run: Run, mlflow_server: str, name: str) -> None:
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("pictures", exact=True).click()
    page.get_by_text(name, exact=True).click()
    ours = MlflowClient(mlflow_server).download_artifacts(run.info.run_id, f"pictures/{name}", ".")
    with Image.open(ours) as picture:
        assert shown_size(page.locator("img[src^='blob:']").first) == list(picture.size)


def shown_size(picture: Any) -> list[int]:
    """Width and height of an image on the page, once the browser has fetched and decoded it."""
    picture.wait_for()
    return picture.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
