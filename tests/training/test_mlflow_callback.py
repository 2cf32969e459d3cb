"""The MLflow callback of Ray Train: whatever fails, MLflow has every step exactly once."""

import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from mlflow import MlflowClient
from support import processes, servers, wheels
from support.processes import REPO, Background, wait_for
from support.tracked import names_in

from ddpm.storage import locations
from ddpm.storage.locations import Location
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.spool import FOLDER, count
from ddpm.training.mlflow_callback import MlflowCallback

Start = Callable[..., MlflowCallback]


@pytest.fixture
def spool(tmp_path: Path) -> Location:
    return locations.resolve(str(tmp_path / "spool")).child("a-run").child(FOLDER)


@pytest.fixture
def start(spool: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Returns a function that makes a callback of one run for the MLflow at a URI, as Ray's controller gets it."""
    made: list[MlflowCallback] = []

    def start(uri: str, **options: Any) -> MlflowCallback:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        callback = MlflowCallback("callbacks", "a-run", spool=str(tmp_path / "spool"), **options)
        made.append(cloudpickle.loads(cloudpickle.dumps(callback)))
        return made[-1]

    yield start
    for callback in made:
        if callback._delivery is not None:
            callback._delivery._uploader.close("KILLED", timeout_s=0.1)


@pytest.fixture
def absent_server() -> str:
    return f"http://{servers.LOOPBACK}:{servers.free_ports(1)[0]}"


def report(callback: MlflowCallback, *ranks: dict[str, Any]) -> None:
    callback.after_report(run_context=None, metrics=list(ranks), checkpoint=None)


def logged_points(uri: str, key: str, run_name: str = "a-run") -> list[tuple[int, float]]:
    """All points of a metric, sorted; duplicates are kept."""
    run = run_at(uri, run_name)
    history = MlflowClient(uri).get_metric_history(run.info.run_id, key) if run else []
    return sorted((point.step, point.value) for point in history)


def run_at(uri: str, run_name: str = "a-run") -> Any:
    """The newest run with this name; None if there is none."""
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"attributes.run_name = '{run_name}'", max_results=1)
    return found[0] if found else None


def test_reports_of_several_attempts_are_kept_and_delivered_once(
    start: Start, spool: Location, absent_server: str, mlflow_server: str
) -> None:
    first, second = start(absent_server), start(absent_server)
    for step in (1, 2, 3):
        report(first, {"step": step, "loss": step + 0.25}, {"step": step, "loss": 9.0})
    wait_for(lambda: count(spool, -1) == 3)
    for step in (2, 3, 4):
        report(second, {"step": step, "loss": step + 0.5}, {"step": step, "loss": 9.0})
    wait_for(lambda: count(spool, -1) == 6)
    with start(mlflow_server, params={"lr": 0.1}) as third:
        report(third, {"step": 5, "loss": 5.5})
        wait_for(lambda: not names_in(spool))
    assert logged_points(mlflow_server, "loss") == [(1, 1.25), (2, 2.25), (3, 3.25), (4, 4.5), (5, 5.5)]
    run = run_at(mlflow_server)
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "0.1"}


def test_a_report_that_cannot_be_logged_does_not_stop_training(
    start: Start, spool: Location, mlflow_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    callback = start(mlflow_server)
    for unfit in ({"loss": 1.0}, {"step": None}, {"step": -1}, {"step": float("nan")}):
        report(callback, unfit)
    callback.after_report(None, [], None)
    (warning,) = caplog.messages
    assert warning == "a report is logged to MLflow only if it has its step as 'step': KeyError('step')"
    values = {"text": "best", "nested": {"loss": 1.0}, "nan": float("nan"), "is_best": True}
    report(callback, {"step": 1} | values)
    wait_for(lambda: logged_points(mlflow_server, "nan") and not names_in(spool))
    with pytest.raises(ZeroDivisionError), callback:
        raise ZeroDivisionError
    run = run_at(mlflow_server)
    assert run.info.status == "FAILED"
    assert sorted(run.data.metrics) == ["is_best", "nan", "step"]


def test_an_unwritable_spool_does_not_block_training(
    start: Start, spool: Location, mlflow_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    callback = start(mlflow_server)
    Path(spool.path).write_text("in the way")
    for step, loss in ((1, 0.5), (2, 0.25), (2, 9.0)):
        report(callback, {"step": step, "loss": loss})
        wait_for(lambda: "Retrying" in caplog.text)
    Path(spool.path).unlink()
    wait_for(lambda: logged_points(mlflow_server, "loss") == [(1, 0.5), (2, 0.25)])


def test_what_is_left_in_the_spool_is_delivered_later(
    start: Start,
    spool: Location,
    absent_server: str,
    mlflow_server: str,
    run_job: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By the call that the warning names, and by jobs/sync.py."""
    callback = start(absent_server)
    report(callback, {"step": 1, "loss": 0.5})
    wait_for(lambda: names_in(spool))
    with caplog.at_level(logging.WARNING):
        assert callback.close("FAILED", timeout_s=1).undelivered == 1
    call = caplog.messages[-1].split("`")[1]
    start(mlflow_server)  # sets the variable that both read
    assert eval(call, {"MlflowCallback": MlflowCallback}).undelivered == 0
    assert run_at(mlflow_server).info.status == "FAILED"
    report(callback, {"step": 2, "loss": 0.25})
    wait_for(lambda: names_in(spool))
    done = run_job("sync", Path(spool.path).parent, "--experiment", "callbacks")
    assert done.returncode == 0, done.stderr
    assert logged_points(mlflow_server, "loss") == [(1, 0.5), (2, 0.25)] and names_in(spool) == []


@pytest.mark.slow
@pytest.mark.long
def test_the_callback_alone_needs_no_pytorch(tmp_path: Path) -> None:
    """The wheel of packages/ddpm-on-ray-callback runs docs/examples/digits_numpy.py."""
    site, absent = tmp_path / "site", tmp_path / "absent"
    wheels.install("packages/ddpm-on-ray-callback", tmp_path)
    absent.mkdir()
    for name in ("torch", "tyro", "safetensors"):
        (absent / f"{name}.py").write_text("raise ImportError(__name__)\n")
    example, env = REPO / "docs/examples/digits_numpy.py", processes.python_path(absent, site)
    done = processes.run([sys.executable, example], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert not (site / "ddpm/config.py").exists()
    losses = logged_points(uri := tracking_uri(), "loss", "digits-numpy")
    assert [step for step, _ in losses] == list(range(1, 21))
    assert losses[-1][1] < losses[0][1] == pytest.approx(math.log(10))
    assert run_at(uri, "digits-numpy").info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.long
def test_the_example_survives_losing_mlflow_and_its_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/examples/digits_mlp.py loses both; after the controller is killed, the same command resumes."""
    spool, log = tmp_path / "spool" / "digits-mlp" / FOLDER, tmp_path / "job.log"
    words = [sys.executable, str(REPO / "docs" / "examples" / "digits_mlp.py")]

    def kept() -> int:
        return count(locations.resolve(str(spool)), -1)

    with servers.MlflowServer(tmp_path / "mlflow") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        with Background(words, log=log, cwd=tmp_path) as job:
            job.wait_for(kept)
            with processes.paused(job.members("ray::RayTrainWorker")):  # MLflow takes seconds to import
                job.wait_for(lambda: logged_points(server.uri, "loss", "digits-mlp"))
                server.kill()
            job.wait_for(lambda: kept() >= 3)
            with processes.paused(job.members("ray::RayTrainWorker")):
                server.start()
                job.wait_for(lambda: kept() == 0)
                (controller,) = job.members("ray::TrainController")
                controller.kill()
            assert job.wait() == 1
        assert run_at(server.uri, "digits-mlp").info.status == "FAILED"
        with Background(words, log=log, cwd=tmp_path) as job:
            assert job.wait() == 0, job.output
        assert [step for step, _ in logged_points(server.uri, "loss", "digits-mlp")] == list(range(1, 41))
        assert {value for _, value in logged_points(server.uri, "rank", "digits-mlp")} == {0}
        assert run_at(server.uri, "digits-mlp").info.status == "FINISHED"
        assert kept() == 0
