"""A search and its trials in MLflow: a trial that MLflow refuses stops no other."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from support import searches, servers, tracked
from support.processes import wait_for
from support.tracked import warnings_of

from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.evaluation.rung import Evaluation
from ddpm.runs import run_folder, storage
from ddpm.runs.run_folder import RunFolder, RunStatus, Search
from ddpm.search import leaderboard, publish
from ddpm.search.publish import SearchRun
from ddpm.search.trials import Trials
from ddpm.tracking import pusher as pusher_module
from ddpm.tracking.mlflow_client import MlflowError
from ddpm.tracking.mlflow_run import PARENT_TAG
from ddpm.tracking.pusher import NoPusher, Pusher

CONFIG = override(DIGITS, {"run.experiment": tracked.EXPERIMENT})
RUNG = Evaluation(64, (2.0, 3.0) * 10, 0.5, 0.25)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A push that failed is repeated soon."""
    monkeypatch.setattr(pusher_module, "FIRST_WAIT_S", 0.2)


@pytest.fixture
def uri(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A server, set as MLFLOW_TRACKING_URI."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return mlflow_server


@pytest.fixture
def trials(tmp_path: Path) -> Trials:
    return searches.begin(storage.resolve(str(tmp_path / "search")), config=CONFIG)


def add_trial(trials: Trials, name: str, status: RunStatus = RunStatus.PRUNED) -> RunFolder:
    """A trial at its first rung, and its run."""
    run = tracked.begin(trials.folder.uri, name, search=Search("search", trials.file.search_key))
    tracked.train(run, 64)
    trials.begin(name, {})
    searches.measure(trials, name, RUNG)
    if status != RunStatus.RUNNING:
        trials.end(name, status)
        tracked.set_status(run, status, 64)
    return run


def pusher_of(trials: Trials) -> Pusher:
    """The pusher of a search's driver; its thread has begun."""
    search_run = SearchRun(trials)
    pusher = Pusher()
    pusher.add(search_run.name, search_run.push)
    pusher.begin()
    return pusher


def in_mlflow(uri: str, run_key: str) -> Run:
    return tracked.run_with_key(uri, run_key)


def test_a_trial_that_was_deleted_in_mlflow_is_told_once_and_the_others_go_on(
    trials: Trials, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    deleted = add_trial(trials, "deleted", RunStatus.RUNNING)
    pusher = pusher_of(trials)
    pusher.add_run(deleted)
    wait_for(lambda: pusher.is_complete)
    MlflowClient(uri).delete_run(in_mlflow(uri, deleted.key).info.run_id)
    other = add_trial(trials, "other")
    pusher.notify("deleted")
    pusher.add_run(other)
    wait_for(lambda: pusher._runs["other"].sent == 0)
    assert in_mlflow(uri, other.key).info.status == "KILLED"

    tracked.train(deleted, 96)
    pusher.notify("deleted")
    trials.end("deleted", RunStatus.PRUNED)
    search_run = SearchRun(trials)
    delivery = publish.send(search_run, leaderboard.ranked(trials), pusher, 60)
    assert delivery is not None and delivery.pushed is not None and not delivery.is_complete
    (line,) = warnings_of(caplog)
    assert "deleted" in line and "restore it there" in line and "\n" not in line
    assert delivery.pushed.run_id == in_mlflow(uri, trials.file.search_key).info.run_id


def test_a_search_that_was_deleted_in_mlflow_stops_no_trial(
    trials: Trials, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    pusher = pusher_of(trials)
    wait_for(lambda: pusher.is_complete)
    MlflowClient(uri).delete_run(in_mlflow(uri, trials.file.search_key).info.run_id)
    run = add_trial(trials, "one")
    pusher.add_run(run)
    pusher.notify("search")
    delivery = pusher.close()
    assert delivery is not None and not delivery.is_complete
    assert PARENT_TAG not in in_mlflow(uri, run.key).data.tags
    (line,) = warnings_of(caplog)
    assert "restore it there" in line


def test_everything_is_sent_once_mlflow_answers(
    trials: Trials, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = add_trial(trials, "one")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://{servers.LOOPBACK}:{servers.free_ports(1)[0]}")
        pusher = pusher_of(trials)
        pusher.add_run(run)
        wait_for(lambda: warnings_of(caplog))
    wait_for(lambda: pusher.is_complete)
    (line,) = warnings_of(caplog)
    assert "\n" not in line
    parent = in_mlflow(uri, trials.file.search_key)
    assert (parent.info.status, parent.data.params["search.rungs"]) == ("RUNNING", "[64, 128]")
    child = in_mlflow(uri, run.key)
    assert (child.info.status, child.data.tags[PARENT_TAG]) == ("KILLED", parent.info.run_id)


def test_an_interrupted_search_pushes_only_what_is_new(trials: Trials, uri: str) -> None:
    search_run = SearchRun(trials)
    pusher = Pusher()
    pusher.add(search_run.name, search_run.push)
    pusher.begin()
    ended = add_trial(trials, "ended")
    unfinished = add_trial(trials, "unfinished", RunStatus.RUNNING)
    for run in (ended, unfinished):
        pusher.add_run(run)
    wait_for(lambda: pusher.is_complete)
    search_run.status = RunStatus.STOPPED
    tracked.set_status(unfinished, RunStatus.STOPPED, 64)
    pusher.notify("search", "unfinished")
    delivery = pusher.close(news_only=True)
    assert delivery is not None and delivery.is_complete
    assert {name: of_run.sent for name, of_run in pusher._runs.items()} == {
        "search": 1,
        "ended": 0,
        "unfinished": 1,
    }
    for key in (trials.file.search_key, unfinished.key):
        assert in_mlflow(uri, key).info.status == RunStatus.STOPPED.in_mlflow


def test_without_tracking_nothing_is_sent(
    trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/never.db")
    add_trial(trials, "one")
    assert publish.send(SearchRun(trials), leaderboard.ranked(trials), NoPusher(), 60) is None
    assert not (tmp_path / "never.db").exists()


# ddpm sync


def test_a_search_is_sent_from_its_folder_alone(
    run_job: Callable[..., Any], trials: Trials, uri: str
) -> None:
    """Of the two trials one has not ended: what there is is sent."""
    runs = [add_trial(trials, "one"), add_trial(trials, "two", RunStatus.RUNNING)]
    done = run_job("sync", trials.folder.uri, env={"MLFLOW_TRACKING_URI": uri})
    assert done.returncode == 0, done.stderr
    parent = in_mlflow(uri, trials.file.search_key)
    assert parent.info.run_id in done.stdout
    assert (parent.info.run_name, parent.info.status) == ("search", "RUNNING")
    assert [in_mlflow(uri, run.key).info.status for run in runs] == ["KILLED", "RUNNING"]
    assert {in_mlflow(uri, run.key).data.tags[PARENT_TAG] for run in runs} == {parent.info.run_id}
    table = Path(trials.folder.path, "results.md").read_text()
    assert "| one | stopped |" in table and parent.data.tags["mlflow.note.content"] == table

    trials.end("two", RunStatus.FINISHED)
    tracked.set_status(runs[1], RunStatus.FINISHED, 64)
    list(publish.sync(trials.folder, 60))
    assert in_mlflow(uri, trials.file.search_key).info.status == "FINISHED"


def test_a_search_of_which_mlflow_refuses_a_trial_is_an_error(trials: Trials, uri: str) -> None:
    runs = [add_trial(trials, name) for name in ("one", "two")]
    list(publish.sync(trials.folder, 60))
    run_id = in_mlflow(uri, runs[0].key).info.run_id
    MlflowClient(uri).delete_run(run_id)
    tracked.train(runs[1], 96)
    with pytest.raises(MlflowError, match=run_id) as raised:
        list(publish.sync(trials.folder, 60))
    assert "\n" not in str(raised.value)
    assert tracked.history(uri, in_mlflow(uri, runs[1].key), "train/loss")[-1][0] == 96


def test_close_does_not_wait_for_a_refused_trial(trials: Trials, uri: str) -> None:
    run = add_trial(trials, "one")
    list(publish.sync(trials.folder, 60))
    MlflowClient(uri).delete_run(in_mlflow(uri, run.key).info.run_id)
    pusher = pusher_of(trials)
    pusher.add_run(run)
    closing = threading.Thread(target=pusher.close, args=(600.0,), daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    assert run_folder.read_card(run.location).search is not None
