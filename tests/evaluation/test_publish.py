"""Reports are written to files, buckets and the MLflow runs of their runs, once; MLflow may be down."""

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_dict
from mlflow.entities import Run
from support import servers
from support.reported import drawn, made, near, result

from ddpm.checkpoints import runs
from ddpm.evaluation import publish
from ddpm.evaluation.report import Report
from ddpm.storage import locations
from ddpm.tracking.mlflow_runs import RUN_KEY_TAG, SENT_UNTIL_TAG
from ddpm.utils.errors import UserError

PICTURE = b"\x89PNG..."


@pytest.fixture
def client(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return MlflowClient(mlflow_server)


@pytest.fixture
def start(client: MlflowClient) -> Callable[[str], Run]:
    """Returns a function that starts an MLflow run with records up to 64 images."""

    def start(key: str) -> Run:
        existing = client.get_experiment_by_name("ddpm")
        experiment_id = existing.experiment_id if existing else client.create_experiment("ddpm")
        return client.create_run(experiment_id, tags={RUN_KEY_TAG: key, SENT_UNTIL_TAG: "64"})

    return start


def report_on(key: str, *steps: int, change: int = 0, **settings: object) -> Report:
    results = (result(i, drawn(i + change), drawn(i, 10, own=False), run_key=key) for i in steps)
    return Report({**made().settings, **settings}, tuple(results))


def points(client: MlflowClient, run: Run, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def published(report: Report) -> list[str]:
    return list(publish.publish(report, PICTURE))


def test_results_are_stored_in_the_mlflow_run_of_the_run(
    client: MlflowClient, start: Callable[[str], Run], mlflow_server: str
) -> None:
    key, other = uuid.uuid4().hex, uuid.uuid4().hex
    run, untouched = start(key), start(other)
    report = report_on(key, 1, 2)
    assert published(report) == [f"MLflow      run {run.info.run_id} in {mlflow_server}"]
    values = [v.drawn[0].scores[1].value for v in report.results]
    assert points(client, run, "eval/KID-pixels") == [(1000, values[0]), (2000, values[1])]
    assert [step for step, _ in points(client, run, "eval/bits_per_dim")] == [1000, 2000]
    assert len(points(client, run, "eval/ddim-10/KID-pixels")) == 2
    files = [file.path for file in client.list_artifacts(run.info.run_id, "evaluation")]
    assert files == [f"evaluation/{report.key}.json", f"evaluation/{report.key}.png"]
    kept = load_dict(f"{run.info.artifact_uri}/evaluation/{report.key}.json")
    assert kept == json.loads(report.to_json())
    after = client.get_run(run.info.run_id)
    assert after.info.status == "RUNNING"
    assert after.data.tags[SENT_UNTIL_TAG] == "64"  # metrics of training are left unchanged
    assert client.get_run(untouched.info.run_id).data.metrics == {}


def test_publishing_again_adds_new_values_and_replaces_only_its_own_files(
    client: MlflowClient, start: Callable[[str], Run]
) -> None:
    key = uuid.uuid4().hex
    run, report = start(key), report_on(key, 1)
    for _ in range(2):
        published(report)
    before = points(client, run, "eval/KID-pixels")
    assert len(before) == 1
    time.sleep(0.01)
    changed = report_on(key, 1, change=5)
    published(changed)
    value = changed.results[0].drawn[0].scores[1].value
    assert sorted(points(client, run, "eval/KID-pixels")) == sorted([*before, (1000, value)])
    assert len(points(client, run, "eval/bits_per_dim")) == 1
    assert client.get_run(run.info.run_id).data.metrics["eval/KID-pixels"] == value
    published(report_on(key, 1, num_images=7))
    assert len(client.list_artifacts(run.info.run_id, "evaluation")) == 4
    time.sleep(0.01)
    published(report)  # the first value counts as new again
    assert client.get_run(run.info.run_id).data.metrics["eval/KID-pixels"] == before[0][1]


def test_each_run_gets_only_its_own_results(
    client: MlflowClient, start: Callable[[str], Run], mlflow_server: str
) -> None:
    keys = [uuid.uuid4().hex, uuid.uuid4().hex]
    found = [start(key) for key in keys]
    unknown = result(5, drawn(5), run="strange", run_key=uuid.uuid4().hex)
    imported = result(0, drawn(0), run="imported", run_key="")
    both = made(*(result(i, drawn(i), run_key=key) for i, key in enumerate(keys, 1)), unknown, imported)
    assert published(both) == [
        *(f"MLflow      run {run.info.run_id} in {mlflow_server}" for run in found),
        f"MLflow      {mlflow_server} does not have run strange; nothing is logged there",
        "MLflow      nothing is logged for runs/imported/checkpoint-0, which belongs to no run",
    ]
    for i, run in enumerate(found, 1):
        assert [step for step, _ in points(client, run, "eval/KID-pixels")] == [1000 * i]


def test_plots_of_nearest_images_are_beside_the_file_and_in_mlflow(
    client: MlflowClient, start: Callable[[str], Run], tmp_path: Path
) -> None:
    key = uuid.uuid4().hex
    run, report = start(key), made(result(1, near(0.03), run_key=key))
    lines = list(publish.store(report, publish.location_for("out/found.json")))
    assert lines[2] == f"nearest     {tmp_path}/out/found-nearest.png"
    assert (tmp_path / "out/found-nearest.png").read_bytes() == b"PNG 0.03"
    names = [file.path for file in client.list_artifacts(run.info.run_id, "evaluation")]
    assert f"evaluation/{report.key}-nearest.png" in names
    assert points(client, run, "eval_low/nearer_than_held_out-pixels") == [(1000, 0.03)]


@pytest.mark.parametrize("storage", ["folder", "bucket"])
def test_results_are_kept_in_the_folder_of_their_run(
    storage: str, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///none.db")
    root = str(tmp_path / "runs") if storage == "folder" else f"{s3_bucket}/{uuid.uuid4().hex}"
    a, b, other = (runs.open_run(name, root) for name in ("a", "b", "other"))
    results = [result(i, near(0.03), run_key=run.key) for i, run in ((1, a), (2, a), (3, b))]
    stored = a, a, other  # run b's checkpoint was copied into another run's folder
    results = [
        replace(r, checkpoint=f"{at.location.uri}/checkpoint-1")
        for r, at in zip(results, stored, strict=True)
    ]
    report = made(*results, result(4, checkpoint="models:/a@b", run_key=a.key + "0"))
    of_a = report.of_run(a.key)
    folder = a.location.child(runs.EVALUATIONS)
    lines = list(publish.store(report, publish.location_for(f"{root}/all.json")))
    assert lines[:2] == [f"results     {root}/all.json", f"plot        {root}/all.png"]
    assert f"run         {folder.uri}/{of_a.key}.json" in lines
    assert locations.resolve(f"{root}/all.json").read() == report.to_json().encode()
    assert locations.resolve(f"{root}/all.png").read().startswith(b"\x89PNG")
    assert folder.child(f"{of_a.key}.json").read() == of_a.to_json().encode()
    assert len(folder.files()) == 3  # with two pictures
    assert not b.location.child(runs.EVALUATIONS).exists() and other.location.files() == ["run.json"]


def test_a_run_that_cannot_keep_its_results_is_named(tmp_path: Path) -> None:
    run = runs.open_run("a", str(tmp_path))
    Path(run.location.path, runs.EVALUATIONS).write_text("not a folder")
    report = made(result(1, drawn(1), run_key=run.key, checkpoint=f"{run.location.uri}/checkpoint-1"))
    (line,) = publish.keep(report)
    assert line.startswith("run         a does not keep its results: cannot write ")
    assert (tmp_path / "a" / runs.EVALUATIONS).read_text() == "not a folder"


def test_a_missing_database_is_not_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///none.db")
    assert published(report_on("key", 1)) == [
        f"MLflow      sqlite:///{tmp_path}/none.db does not have run a; nothing is logged there"
    ]
    assert list(tmp_path.iterdir()) == []


def test_mlflow_may_be_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"http://{servers.LOOPBACK}:{servers.free_ports(1)[0]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("://", "://me:s3cret@"))
    lines = list(publish.store(report_on("key", 1), publish.location_for("out/found.json"), timeout_s=0.5))
    assert lines[:2] == [f"results     {tmp_path}/out/found.json", f"plot        {tmp_path}/out/found.png"]
    assert lines[2].startswith(f"MLflow      {uri} cannot be reached, nothing is logged: ")
    assert "s3cret" not in lines[2] and "\n" not in lines[2]
    assert json.loads((tmp_path / "out/found.json").read_text())["checkpoints"][0]["images_seen"] == 1000
    assert (tmp_path / "out/found.png").read_bytes().startswith(b"\x89PNG")


def test_an_invalid_output_path_is_rejected_before_the_evaluation(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for out, message in {
        "folder": "folder is a folder",
        "file/found.json": "file is not a writable folder",
        "found.png": "found.png names an image",
    }.items():
        with pytest.raises(UserError, match=message):
            publish.location_for(out)
    assert publish.location_for("new/folder/found.json").path == f"{tmp_path}/new/folder/found.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
