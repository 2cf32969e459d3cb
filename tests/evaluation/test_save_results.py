"""Reports are written to files, buckets and the folders of their runs, which are pushed to MLflow; it may be down."""

import json
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_dict
from support import compared, servers, tracked
from support.reported import drawn, made, near, result

from ddpm.evaluation import save_results
from ddpm.runs import run_folder
from ddpm.runs import storage as locations
from ddpm.runs.evaluations import CheckpointResult, Report
from ddpm.runs.run_folder import RunFolder
from ddpm.tracking.push import push
from ddpm.utils.errors import UserError


@pytest.fixture
def client(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return MlflowClient(mlflow_server)


def make_run(folder: Path, name: str = "a") -> RunFolder:
    uri, _ = compared.make_run(str(folder), name)
    return run_folder.existing_run(uri)


def of_run(run: RunFolder, original: CheckpointResult) -> CheckpointResult:
    """The result, of a checkpoint of `run`."""
    return replace(original, run=run.name, run_key=run.key, checkpoint=f"{run.location.uri}/checkpoint-1")


def report_on(run: RunFolder, *steps: int, change: int = 0, **settings: object) -> Report:
    results = (of_run(run, result(i, drawn(i + change))) for i in steps)
    return Report({**made().settings, **settings}, tuple(results))


def points(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def stored(report: Report, out: str, timeout_s: float = 20.0) -> list[str]:
    """Store a report as the command does; returns the lines."""
    location = save_results.output_location(out)
    return [*save_results.to_file(report, location), *save_results.to_runs(report, timeout_s)]


def kept(report: Report) -> list[str]:
    return list(save_results.to_runs(report))


def test_results_are_in_the_run_and_in_mlflow(
    client: MlflowClient, mlflow_server: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    other = make_run(tmp_path, "other")
    run_id = push(run).run_id
    untouched = push(other).run_id
    before = points(client, run_id, "train/loss")
    report = report_on(run, 1, 2)
    assert kept(report)[-1] == f"MLflow      run {run_id} in {mlflow_server}"
    values = [v.drawn.scores[1].value for v in report.results]
    assert points(client, run_id, "eval/KID-pixels") == [(1000, values[0]), (2000, values[1])]
    assert [step for step, _ in points(client, run_id, "eval/bits_per_dim")] == [1000, 2000]
    files = [file.path for file in client.list_artifacts(run_id, "evaluation")]
    assert files == [f"evaluation/{report.key}.json"]
    shown = load_dict(f"{client.get_run(run_id).info.artifact_uri}/evaluation/{report.key}.json")
    in_folder = json.loads(run.location.child(f"{run_folder.EVALUATIONS}/{report.key}.json").read())
    assert shown == in_folder
    assert {**shown, "time_ms": 0} == json.loads(report.to_json())
    assert points(client, run_id, "train/loss") == before
    assert "eval/KID-pixels" not in client.get_run(untouched).data.metrics


def test_publishing_again_adds_new_values_and_replaces_only_its_own_files(
    client: MlflowClient, tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    run_id = push(run).run_id
    report = report_on(run, 1)
    for _ in range(2):
        kept(report)
    before = points(client, run_id, "eval/KID-pixels")
    assert len(before) == 1
    changed = report_on(run, 1, change=5)
    kept(changed)
    value = changed.results[0].drawn.scores[1].value
    assert sorted(points(client, run_id, "eval/KID-pixels")) == sorted([*before, (1000, value)])
    assert client.get_run(run_id).data.metrics["eval/KID-pixels"] == value
    kept(report_on(run, 1, num_images=7))
    assert len(client.list_artifacts(run_id, "evaluation")) == 2
    kept(report)  # the first value counts as new again
    assert client.get_run(run_id).data.metrics["eval/KID-pixels"] == before[0][1]


def test_each_run_gets_only_its_own_results(client: MlflowClient, mlflow_server: str, tmp_path: Path) -> None:
    found = [make_run(tmp_path, name) for name in ("a", "b")]
    ids = [push(run).run_id for run in found]
    unknown = make_run(tmp_path, "strange")
    results = [of_run(run, result(i, drawn(i))) for i, run in enumerate([*found, unknown], 1)]
    imported = result(0, drawn(0), run="imported", run_key="")
    moved = replace(results[0], run_key=uuid.uuid4().hex)
    report = made(*results, imported, moved)
    lines = stored(report, "all.json")
    assert [line for line in lines if line.startswith("MLflow ")] == [
        *(f"MLflow      run {run_id} in {mlflow_server}" for run_id in ids),
        f"MLflow      {mlflow_server} does not have run strange; `ddpm sync {unknown.location.uri}` sends it",
        "MLflow      nothing is logged for runs/imported/checkpoint-0, which is not in its run's folder",
        f"MLflow      nothing is logged for {moved.checkpoint}, which is not in its run's folder",
    ]
    for i, run_id in enumerate(ids, 1):
        assert [step for step, _ in points(client, run_id, "eval/KID-pixels")] == [1000 * i]
    assert len(unknown.location.child(run_folder.EVALUATIONS).files()) == 1
    push(unknown)  # ddpm sync
    run_id = tracked.run_with_key(mlflow_server, unknown.key).info.run_id
    assert [step for step, _ in points(client, run_id, "eval/KID-pixels")] == [3000]


def test_plots_of_nearest_images_are_beside_the_file_and_in_mlflow(
    client: MlflowClient, tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    run_id = push(run).run_id
    report = made(of_run(run, result(1, near(0.03))))
    lines = stored(report, "out/found.json")
    assert lines[1] == f"nearest     {tmp_path}/out/found-nearest.png"
    assert (tmp_path / "out/found-nearest.png").read_bytes() == b"PNG 0.03"
    names = [file.path for file in client.list_artifacts(run_id, "evaluation")]
    assert f"evaluation/{report.key}-nearest.png" in names
    assert points(client, run_id, "eval_low/nearer_than_held_out-pixels") == [(1000, 0.03)]


@pytest.mark.parametrize("storage", ["folder", "bucket"])
def test_results_are_kept_in_the_folder_of_their_run(
    storage: str, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///none.db")
    root = str(tmp_path / "runs") if storage == "folder" else f"{s3_bucket}/{uuid.uuid4().hex}"
    a, b, other = (run_folder.open_run(name, root) for name in ("a", "b", "other"))
    results = [result(i, near(0.03), run_key=run.key) for i, run in ((1, a), (2, a), (3, b))]
    places = a, a, other  # run b's checkpoint was copied into another run's folder
    results = [
        replace(r, checkpoint=f"{at.location.uri}/checkpoint-1")
        for r, at in zip(results, places, strict=True)
    ]
    report = made(*results, result(4, checkpoint="models:/a@b", run_key=a.key + "0"))
    of_a = report.of_run(a.key)
    folder = a.location.child(run_folder.EVALUATIONS)
    lines = stored(report, f"{root}/all.json")
    assert lines[0] == f"results     {root}/all.json"
    assert f"run         {folder.uri}/{of_a.key}.json" in lines
    assert locations.resolve(f"{root}/all.json").read() == report.to_json().encode()
    content = json.loads(folder.child(f"{of_a.key}.json").read())
    assert content["time_ms"] > 10**12
    assert {**content, "time_ms": 0} == json.loads(of_a.to_json())
    assert Report.from_json(folder.child(f"{of_a.key}.json").read(), "here").results == of_a.results
    assert len(folder.files()) == 3  # with two pictures
    assert not b.location.child(run_folder.EVALUATIONS).exists() and other.location.files() == ["run.json"]


def test_a_run_that_cannot_keep_its_results_is_named(tmp_path: Path) -> None:
    run = run_folder.open_run("a", str(tmp_path))
    Path(run.location.path, run_folder.EVALUATIONS).write_text("not a folder")
    (line,) = kept(report_on(run, 1))
    assert line.startswith("run         a does not keep its results: cannot write ")
    assert (tmp_path / "a" / run_folder.EVALUATIONS).read_text() == "not a folder"


def test_a_missing_database_is_not_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///none.db")
    *_, line = kept(report_on(make_run(tmp_path / "runs"), 1))
    assert line.startswith(f"MLflow      sqlite:///{tmp_path}/none.db does not have run a; ")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_an_untracked_run_is_not_pushed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    card = run.location.child(run_folder.CARD)
    content = json.loads(card.read())
    content["config"] = {"run": {"tracking": "none"}}
    card.write(json.dumps(content).encode())
    (line,) = kept(report_on(run, 1))
    assert line.startswith("run         ")


def test_mlflow_may_be_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"http://{servers.LOOPBACK}:{servers.free_ports(1)[0]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("://", "://me:s3cret@"))
    report = report_on(make_run(tmp_path), 1)
    lines = stored(report, "out/found.json", timeout_s=0.5)
    assert lines[0] == f"results     {tmp_path}/out/found.json"
    assert lines[-1].startswith("MLflow ") and uri.removeprefix("http://") in lines[-1]
    assert "s3cret" not in lines[-1] and "\n" not in lines[-1]
    assert json.loads((tmp_path / "out/found.json").read_text())["checkpoints"][0]["images_seen"] == 1000
    assert (tmp_path / f"a/evaluations/{report.key}.json").exists()


def test_an_invalid_output_path_is_rejected_before_the_evaluation(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for out, message in {
        "folder": "folder is a folder",
        "file/found.json": "file is not a writable folder",
    }.items():
        with pytest.raises(UserError, match=message):
            save_results.output_location(out)
    assert save_results.output_location("new/folder/found.json").path == f"{tmp_path}/new/folder/found.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
