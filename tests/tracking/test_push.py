"""A push sends what a run's folder has to MLflow, and has the same result however often and by whom it is made.

Tested with a real server and with SQLite files, the default on a laptop.
"""

import json
import logging
import shutil
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from support import forked, servers, tracked
from support.front_end import Answer, FrontEnd
from support.tracked import MlflowFaultProxy, content, warnings_of

from ddpm.config.json import override
from ddpm.runs import curves, run_folder
from ddpm.runs.curves import CurveRow
from ddpm.runs.run_folder import RunFolder, RunStatus, Search
from ddpm.tracking import mlflow_pages, mlflow_run
from ddpm.tracking.mlflow_client import Connection, MlflowError, tracking_uri, without_password
from ddpm.tracking.push import SENT_TAG, is_in_mlflow, push
from ddpm.tracking.pusher import push_patiently

SAMPLED = [
    (key, step, tracked.time_at(step), kind)
    for key in (run_folder.DENOISING, run_folder.SAMPLES)
    for step in (32, 64, 96, 128)
    for kind in ("png", "webp")
]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return tracked.write_run(tmp_path)


@pytest.fixture
def uri(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """MLflow, set as MLFLOW_TRACKING_URI: a server, unless a test asks for the database too."""
    kind = getattr(request, "param", "server")
    uri = request.getfixturevalue("mlflow_server") if kind == "server" else tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


on_both_kinds = pytest.mark.parametrize("uri", ["server", "sqlite"], indirect=True)


@pytest.fixture
def proxy(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowFaultProxy]:
    """A proxy in front of the server, set as MLFLOW_TRACKING_URI."""
    with MlflowFaultProxy(mlflow_server) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
        yield proxy


def reference(run: RunFolder) -> dict[str, Any]:
    """What MLflow has of a run after one undisturbed push, to the database that all tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI")
        push(run)
        return content(tracking_uri(), run)


def unmark(uri: str, run: RunFolder) -> None:
    """Let MLflow forget what it has."""
    MlflowClient(uri).delete_tag(tracked.run_with_key(uri, run.key).info.run_id, SENT_TAG)


# What a push sends.


@on_both_kinds
@pytest.mark.lowest
def test_a_push_sends_everything(uri: str, run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    pushed = push(run)
    found = tracked.run_with_key(uri, run.key)
    sent = content(uri, run)
    assert (pushed.run_id, pushed.experiment_id) == (found.info.run_id, found.info.experiment_id)
    assert pushed.num_points == curves.num_rows(run.location)
    assert (sent["name"], sent["experiment"], sent["status"]) == ("a-run", tracked.EXPERIMENT, "FINISHED")
    assert sent["time"] == (run_folder.read_card(run.location).created_ms, tracked.time_at(128) + 1)

    assert sent["params"]["train.total_images"] == "128"
    assert sent["params"]["model.width_multipliers"] == "(1, 2)"
    tags = sent["tags"]
    assert (tags["preset"], tags["changed"]) == ("digits", "optim.lr=0.5")
    assert (tags["command"], tags["hardware"]) == (tracked.COMMAND, "2 cores")
    assert (tags["version.ddpm"], tags["checkpoint"]) == ("0.2.0", "RUN/checkpoint-000000000128-g1")
    assert "Finished at 128 of 128 images" in tags[mlflow_pages.NOTE_TAG]
    ((data, tags_of_data),) = sent["data"]
    assert (data["name"], json.loads(data["source"])) == ("digits", {"uri": tracked.DATA.uri})
    assert json.loads(data["profile"])["images"] == 1500
    assert tags_of_data == [("mlflow.data.context", "training")]

    table = curves.read_rows(run.location).to_pylist()
    assert len(sent["metrics"]["train/loss"]) == 6
    for row in table:
        step = row["images_seen"]
        time_ms = row["timestamp_ms"]
        value = row["value"]
        shown = "1.7976931348623157e+308" if value == float("inf") else repr(value)  # as MLflow keeps it
        assert (step, time_ms, shown) in sent["metrics"][row["name"]]
    assert sent["newest"]["train/loss"] == repr(tracked.loss_at(128))
    for name, value in tracked.EVALUATED.items():
        assert sent["metrics"][name] == [(128, tracked.time_at(128) + 2, repr(value))]

    files = sent["artifacts"]
    created_ms = run_folder.read_card(run.location).created_ms
    last = [(mlflow_pages.LAST_GRID, 0, created_ms, kind) for kind in ("png", "webp")]
    assert tracked.pictures_in(files) == sorted([*SAMPLED, *last])
    others = {name: data for name, data in files.items() if not name.startswith("images/")}
    folder = Path(run.location.path)
    assert others == {
        "config.json": (folder / "checkpoint-000000000128-g1/config.json").read_bytes(),
        mlflow_pages.GRID: (folder / "samples/000000000128.png").read_bytes(),
        "pictures/noising.png": tracked.PICTURE,
        "evaluation/at-128.json": (folder / "evaluations/at-128.json").read_bytes(),
        "evaluation/at-128.png": tracked.PICTURE,
    }
    (grid,) = (name for name in files if name.startswith("images/samples+step+64+") and name.endswith(".png"))
    assert files[grid] == (folder / "samples/000000000064.png").read_bytes()
    assert warnings_of(caplog) == []


def test_a_push_of_a_bucket(s3_bucket: str, database: Path, tmp_path: Path) -> None:
    run = tracked.write_run(f"{s3_bucket}/runs")
    push(run)
    assert tracked.pictures_in(content(tracking_uri(), run)["artifacts"])[: len(SAMPLED)] == SAMPLED


def test_more_than_a_call_can_take(database: Path, tmp_path: Path) -> None:
    run = tracked.begin(tmp_path)
    rows = [CurveRow(f"m{i}", step, float(step), step) for step in range(50) for i in range(50)]
    tracked.append(run, rows)
    assert push(run).num_points == 2500
    found = tracked.run_with_key(tracking_uri(), run.key)
    for name in ("m0", "m49"):
        assert tracked.history(tracking_uri(), found, name) == [(step, float(step)) for step in range(50)]


@on_both_kinds
def test_each_push_sends_what_is_new(uri: str, tmp_path: Path) -> None:
    run = tracked.begin(tmp_path)
    push(run)  # nothing is recorded yet
    assert tracked.run_with_key(uri, run.key).info.status == "RUNNING"
    tracked.train(run, 32, 64)
    assert push(run).num_points == 4
    tracked.set_status(run, RunStatus.STOPPED, 64)
    push(run)
    stopped = tracked.run_with_key(uri, run.key)
    assert (stopped.info.status, stopped.info.end_time) == ("SCHEDULED", tracked.time_at(64) + 1)
    assert "Stopped at 64 of 128 images" in stopped.data.tags[mlflow_pages.NOTE_TAG]
    tracked.train(run, 96, 128)
    assert push(run).num_points == 4
    assert tracked.run_with_key(uri, run.key).info.status == "RUNNING"
    tracked.finish(run)
    tracked.evaluate(run)
    tracked.evaluate(run, 128, "again", bits=3.9)
    assert push(run).num_points == 0
    assert content(uri, run) == reference(run)


# A push can be repeated.


def test_a_second_push_makes_few_calls_and_no_change(uri: str, run: RunFolder) -> None:
    push(run)
    before = tracked.run_with_key(uri, run.key)
    calls: list[None] = []
    assert push(run, accepted=lambda: calls.append(None)).num_points == 0
    assert len(calls) <= 5
    after = tracked.run_with_key(uri, run.key)
    assert (after.info.end_time, after.data.tags) == (before.info.end_time, before.data.tags)


@pytest.mark.parametrize("who", ["nothing was marked", "a copy of the folder"])
def test_everything_sent_again_gives_the_same_content(
    uri: str, run: RunFolder, tmp_path: Path, who: str
) -> None:
    push(run)
    before = content(uri, run)
    unmark(uri, run)
    if who == "a copy of the folder":
        shutil.move(run.location.path, tmp_path / "elsewhere")
        run = run_folder.existing_run(str(tmp_path / "elsewhere"))
    assert push(run).num_points == curves.num_rows(run.location)
    after = content(uri, run)
    assert after == before | {"name": after["name"]}


def test_another_server_gets_the_same_content(
    run: RunFolder, database: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run)
    first = content(tracking_uri(), run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    push(run)
    assert content(mlflow_server, run) == first


def test_a_database_that_was_deleted_gets_the_same_content(run: RunFolder, database: Path) -> None:
    push(run)
    before = content(tracking_uri(), run)
    database.unlink()
    push(run)
    assert content(tracking_uri(), run) == before


def test_merged_curves_are_not_sent_again(database: Path, run: RunFolder) -> None:
    push(run)
    before = content(tracking_uri(), run)
    curves.merge(run.location, 2, pytest.fail)
    assert push(run).num_points == 0
    unmark(tracking_uri(), run)
    push(run)
    assert content(tracking_uri(), run) == before


def test_a_user_s_own_description_stays(database: Path, run: RunFolder) -> None:
    push(run)
    run_id = tracked.run_with_key(tracking_uri(), run.key).info.run_id
    MlflowClient(tracking_uri()).set_tag(run_id, mlflow_pages.NOTE_TAG, "My best run.")
    unmark(tracking_uri(), run)
    push(run)
    assert tracked.run_with_key(tracking_uri(), run.key).data.tags[mlflow_pages.NOTE_TAG] == "My best run."


def test_a_run_that_was_deleted_in_mlflow_is_one_line(uri: str, run: RunFolder) -> None:
    run_id = push(run).run_id
    MlflowClient(uri).delete_run(run_id)
    with pytest.raises(MlflowError, match=run_id) as raised:
        push_patiently(run, 60)
    assert "\n" not in str(raised.value) and not raised.value.is_temporary
    MlflowClient(uri).restore_run(run_id)
    push(run)
    assert content(uri, run) == reference(run)


# Processes that die, and two at once.


@pytest.mark.slow
def test_a_push_killed_at_any_point_is_completed_by_the_next(
    forkserver: ForkServerContext, empty_database: Path, database: Path, tmp_path: Path
) -> None:
    """For each change that a push makes in MLflow: a process dies right after it, and the next one three changes
    later."""
    run = tracked.begin(tmp_path)
    tracked.train(run, 64, 128)
    tracked.finish(run)
    tracked.evaluate(run)
    expected = reference(run)
    for last_change in count(1):
        shutil.copy(empty_database, database)
        exits = []
        for change in (last_change, 3):
            arguments = (tracking_uri(), run.location.uri, change)
            process = forkserver.Process(target=forked.push_and_die, args=arguments)
            process.start()
            process.join()
            exits.append(process.exitcode)
        push(run)
        assert content(tracking_uri(), run) == expected, last_change
        if exits[0] == 0:
            break
        assert exits[0] == -signal.SIGKILL
    assert last_change > 20


class TwoCreations(FrontEnd):
    """A proxy that forwards the first creation of a run once there is a second one."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self._both = threading.Barrier(2)

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if path.endswith("/runs/create"):
            self._both.wait(120)
        return None


def test_two_pushes_at_once_make_one_run(
    forkserver: ForkServerContext, mlflow_server: str, run: RunFolder
) -> None:
    """Both processes find no run, and create one."""
    with TwoCreations(mlflow_server) as front:
        arguments = (front.uri, run.location.uri)
        two = [forkserver.Process(target=forked.push, args=arguments) for _ in range(2)]
        for process in two:
            process.start()
        for process in two:
            process.join()
        assert [process.exitcode for process in two] == [0, 0]
    assert content(mlflow_server, run) == reference(run)


def test_of_two_mlflow_runs_of_a_run_the_older_stays(uri: str, run: RunFolder) -> None:
    client = MlflowClient(uri)
    experiment_id = mlflow_run.experiment_id(Connection(uri), tracked.EXPERIMENT)
    tags = {mlflow_run.RUN_KEY_TAG: run.key}
    younger, older = (
        client.create_run(experiment_id, start_time=at, tags=tags).info.run_id for at in (2_000, 1_000)
    )
    assert push(run).run_id == older
    assert tracked.run_with_key(uri, run.key).info.run_id == older
    assert client.get_run(younger).info.lifecycle_stage == "deleted"


def test_a_run_that_another_process_deletes_meanwhile_is_pushed_to_the_older_one(
    uri: str, run: RunFolder
) -> None:
    """The other process has created an older run, and finds ours."""
    mlflow = Connection(uri)
    older = list[str]()

    def create_older() -> None:
        ours = mlflow_run.find(mlflow, tracked.EXPERIMENT, run.key)
        if older or ours is None or not ours.data.params:
            return
        experiment_id = mlflow_run.experiment_id(mlflow, tracked.EXPERIMENT)
        tags = {mlflow_run.RUN_KEY_TAG: run.key}
        older.append(mlflow.client.create_run(experiment_id, start_time=1_000, tags=tags).info.run_id)
        mlflow_run.find(mlflow, tracked.EXPERIMENT, run.key)

    with pytest.raises(MlflowError) as raised:
        push(run, accepted=create_older)
    assert raised.value.is_temporary
    assert [push(run).run_id] == older
    found = content(uri, run)
    expected = reference(run)
    for key in ("params", "metrics", "artifacts", "status"):
        assert found[key] == expected[key]


# What MLflow refuses, and what is damaged.


def test_what_mlflow_refuses_is_skipped(
    proxy: MlflowFaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = {"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}
    proxy.fails = lambda method, path, body: (400, refusal) if b'"optim.lr"' in body else None
    run = tracked.write_run(tmp_path)
    expected = reference(run)
    tracked.append(run, [CurveRow("no such: name?!", 128, 1.0, 1), CurveRow("train/lr", 130, 2.0, 2)])
    push(run)
    of_param, of_metric = warnings_of(caplog)
    assert "param optim.lr" in of_param and "metric no such: name?!" in of_metric
    found = content(proxy.uri, run)
    assert found["metrics"]["train/lr"][-1] == (130, 2, "2.0")
    del expected["params"]["optim.lr"], expected["metrics"]["train/lr"], found["metrics"]["train/lr"]
    for key in ("params", "metrics", "artifacts", "status"):
        assert found[key] == expected[key]
    push(run)
    assert len(warnings_of(caplog)) == 2


def test_a_damaged_part_of_the_curves_is_one_line(
    database: Path, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    (damaged,) = (Path(run.location.path) / curves.FOLDER).glob("000000000-*.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    push(run)
    (line,) = warnings_of(caplog)
    assert str(damaged) in line
    found = content(tracking_uri(), run)
    assert [step for step, _, _ in found["metrics"]["train/lr"]] == [96, 128]
    assert found["status"] == "FINISHED"
    push(run)
    assert len(warnings_of(caplog)) == 1


def test_a_damaged_evaluation_is_one_line(
    database: Path, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = run.location.child(f"{run_folder.EVALUATIONS}/a-broken.json")
    damaged.write(b'{"checkpoints": [')
    push(run)
    assert all(damaged.uri in line for line in warnings_of(caplog))
    found = content(tracking_uri(), run)
    assert found["metrics"].keys() > tracked.EVALUATED.keys()
    assert found["status"] == "FINISHED"


def test_a_damaged_status_is_one_line(
    database: Path, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """The next start of the run writes it again."""
    status = run.location.child(run_folder.STATUS)
    status.write(b"{")
    push(run)
    (line,) = warnings_of(caplog)
    assert status.uri in line
    assert content(tracking_uri(), run)["status"] == "RUNNING"


@pytest.mark.parametrize("server", ["works", "is down"])
def test_no_password_is_in_any_output(
    run: RunFolder,
    mlflow_server: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    server: str,
) -> None:
    (port,) = servers.free_ports(1)
    where = mlflow_server if server == "works" else f"http://{servers.LOOPBACK}:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", where.replace("://", "://me:s3cret@"))
    caplog.set_level(logging.DEBUG)
    tracked.append(run, [CurveRow("no such: name?!", 128, 1.0, 1)])
    if server == "works":
        said = push(run).uri
        assert "refuses" in caplog.text
        assert "s3cret" not in repr(content(mlflow_server, run))
    else:
        with pytest.raises(MlflowError, match=where) as raised:
            push_patiently(run, 1)
        said = str(raised.value)
    assert "s3cret" not in said + caplog.text + "".join(capfd.readouterr())


# Runs of other kinds.


def test_changed_settings_of_a_resumed_run_are_tags(database: Path, tmp_path: Path) -> None:
    run = tracked.begin(tmp_path)
    tracked.train(run, 64)
    push(run)
    changed = override(tracked.CONFIG, {"optim.lr": 0.25, "train.total_images": 192})
    tracked.train(run, 128, config=changed)
    push(run)
    found = content(tracking_uri(), run)
    assert found["params"]["optim.lr"] == str(tracked.CONFIG.optim.lr)  # params never change in MLflow
    resumed = {name: value for name, value in found["tags"].items() if name.startswith("resumed.")}
    assert resumed == {"resumed.optim.lr": "0.25", "resumed.train.total_images": "192"}
    assert "128 of 192 images" in found["tags"][mlflow_pages.NOTE_TAG]
    assert found == reference(run)


def test_a_setting_that_is_changed_back_has_no_tag(database: Path, tmp_path: Path) -> None:
    run = tracked.begin(tmp_path)
    changed = override(tracked.CONFIG, {"optim.lr": 0.25})
    for step, config in ((32, tracked.CONFIG), (64, changed), (128, tracked.CONFIG)):
        tracked.train(run, step, config=config)
        push(run)
    found = content(tracking_uri(), run)
    assert [name for name in found["tags"] if name.startswith("resumed.")] == []
    assert found == reference(run)


def test_a_trial_gets_its_parent_once_there_is_one(database: Path, tmp_path: Path) -> None:
    search = Search("a-search", "5" * 32)
    run = tracked.begin(tmp_path, search=search)
    push(run)
    found = tracked.run_with_key(tracking_uri(), run.key)
    assert mlflow_run.PARENT_TAG not in found.data.tags
    mlflow = Connection(tracking_uri())
    parent = mlflow_run.open_run(mlflow, tracked.EXPERIMENT, search.key, search.name, source="tune/search.py")
    push(run)
    found = tracked.run_with_key(tracking_uri(), run.key)
    assert found.data.tags[mlflow_run.PARENT_TAG] == parent.run_id
    assert "command" not in found.data.tags


# Connections.


def test_whether_mlflow_has_a_run_changes_nothing_there(run: RunFolder, database: Path) -> None:
    assert not is_in_mlflow(run)
    assert [found.name for found in MlflowClient(tracking_uri()).search_experiments()] == ["Default"]
    push(run)
    assert is_in_mlflow(run)
    database.unlink()
    assert not is_in_mlflow(run)
    assert not database.exists()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:pass@host:5000/path", "http://host:5000/path"),
        ("http://me:p@ss://word@host", "http://host"),
        ("https://host", "https://host"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_without_password(uri: str, shown: str) -> None:
    assert without_password(uri) == shown


def test_a_relative_database_path_is_relative_to_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub.db")
    assert tracking_uri() == f"sqlite:///{tmp_path}/sub.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri() == "http://host:5000"


def test_artifacts_are_stored_beside_the_database(run: RunFolder, database: Path, tmp_path: Path) -> None:
    push(run)
    (stored,) = tmp_path.rglob("artifacts/**/noising.png")
    assert stored.is_relative_to(database.parent / "mlruns")
    with closing(sqlite3.connect(database)) as opened:
        assert opened.execute("SELECT count(*) FROM runs").fetchone() == (1,)
