"""The thread that sends a search and its trials to MLflow while the search runs."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from support import servers, tracked
from support.processes import wait_for

from ddpm.runs import run_folder, storage
from ddpm.runs.run_folder import RunFolder, Search
from ddpm.search.publisher import Parent, Publisher, mark_interrupted
from ddpm.search.trials import Trials
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.mlflow_run import PARENT_TAG, RUN_KEY_TAG

LONG_S = 60.0


@pytest.fixture
def trials(tmp_path: Path) -> Trials:
    return Trials(storage.resolve(str(tmp_path / "search")), {})


@pytest.fixture
def run(trials: Trials) -> RunFolder:
    """The run of a trial that was stopped early."""
    run = tracked.begin(trials.folder.uri, "one", search=Search("s", trials.key))
    tracked.train(run, 64)
    trials.begin("one", {})
    trials.end("one", "stopped")
    return run


def publisher_of(trials: Trials, warnings: list[str]) -> Publisher:
    parent = Parent(Search("s", trials.key), tracked.EXPERIMENT)
    return Publisher(parent, trials, {"search.seed": 0}, warnings.append)


def is_there(run_key: str) -> bool:
    client = MlflowClient(tracking_uri())
    experiment = client.get_experiment_by_name(tracked.EXPERIMENT)
    if experiment is None:
        return False
    found = client.search_runs([experiment.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{run_key}'")
    return any(run.info.status == "KILLED" for run in found)


def test_a_trial_is_sent_once_mlflow_answers(
    trials: Trials, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm.search.publisher.RETRY_S", 0.1)
    warnings = list[str]()
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://{servers.LOOPBACK}:{servers.free_ports(1)[0]}")
        publisher = publisher_of(trials, warnings)
        publisher.notify("one")
        wait_for(lambda: warnings)
    wait_for(lambda: is_there(run.key))
    publisher.close(LONG_S)
    assert len(warnings) == 1 and "\n" not in warnings[0]
    parent = tracked.run_with_key(tracking_uri(), trials.key)
    assert (parent.info.status, parent.data.params) == ("RUNNING", {"search.seed": "0"})
    child = tracked.run_with_key(tracking_uri(), run.key)
    assert child.data.tags[PARENT_TAG] == parent.info.run_id


def test_without_tracking_the_outcome_is_in_the_run_folder(
    trials: Trials, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/never.db")
    parent = Parent(Search("s", trials.key), tracked.EXPERIMENT, is_tracked=False)
    publisher = Publisher(parent, trials, {}, print)
    publisher.notify("one")
    wait_for(lambda: (status := run_folder.read_status(run.location)) and status.status == "PRUNED")
    publisher.close(LONG_S)
    mark_interrupted(parent, trials)
    assert not (tmp_path / "never.db").exists()


def test_close_does_not_wait_for_mlflow(
    trials: Trials, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{servers.LOOPBACK}:{servers.free_ports(1)[0]}")
    warnings = list[str]()
    publisher = publisher_of(trials, warnings)
    publisher.notify("one")
    wait_for(lambda: warnings)
    publisher.close(10 * LONG_S)
    assert not publisher._thread.is_alive()
