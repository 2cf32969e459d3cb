"""Take pictures of MLflow's pages into docs/: python docs/screenshots.py URI EXPERIMENT

URI is an MLflow server that has finished runs of three schedules in EXPERIMENT, made by
`python jobs/train.py digits --schedule.kind KIND --run.name KIND --run.experiment EXPERIMENT`. Needs playwright and
Debian's chromium.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from playwright.sync_api import sync_playwright

from ddpm.tracking import mlflow_pages

PIXELS = 1400
WAIT_MS = 4000
"""Pages have no sign of being complete: charts and pictures come last."""
PANEL = "[data-component-id='mlflow.assistant.chat_panel.close']"


def main(uri: str, experiment: str) -> None:
    client = MlflowClient(uri)
    number = client.get_experiment_by_name(experiment).experiment_id
    ids = [run.info.run_id for run in client.search_runs([number])]
    compare = (
        f"compare-runs?runs={json.dumps(ids)}&experiments={json.dumps([number])}&{mlflow_pages.WORKFLOW}"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])

        def take(name: str, place: str, act: Callable[[Any], object], width: int = PIXELS) -> None:
            size = {"width": width, "height": width * 2 // 3}
            page = browser.new_page(viewport=size, device_scale_factor=PIXELS / width)
            page.goto(f"{uri}/#/{place}")
            page.wait_for_timeout(WAIT_MS)
            page.locator(PANEL).click()
            act(page)
            page.wait_for_timeout(WAIT_MS)
            page.screenshot(path=Path(__file__).parent / f"{name}.png")

        take("mlflow-run", f"experiments/{number}/runs/{ids[0]}?{mlflow_pages.WORKFLOW}", show_more)
        # On a narrow window MLflow 3.17 leaves no room for the names of the files.
        take("mlflow-compare", compare, show_grids, width=2200)


def show_more(page: Any) -> None:
    page.get_by_text("Show more").first.click()


def show_grids(page: Any) -> None:
    """Close what is between the names of the runs and their grids."""
    page.get_by_text(mlflow_pages.GRID, exact=True).click()
    for section in ("Visualizations", "Parameters"):
        page.get_by_text(section, exact=True).last.click()


if __name__ == "__main__":
    main(*sys.argv[1:])
