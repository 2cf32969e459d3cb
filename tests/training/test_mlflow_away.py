"""MLflow is down for a part or all of a run: training continues, and in the end MLflow has everything once."""

from pathlib import Path

import pytest
from support.faulted import Run, assert_same, assert_tracked_once
from support.processes import members, paused, run_job
from support.servers import MlflowServer, RayHead

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_ray_head")]


def test_mlflow_is_killed_and_restarted_during_a_run(
    run: Run, undisturbed: Run, ray_head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MlflowServer(tmp_path / "mlflow") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        with run.start() as job:
            job.wait_for(run.past(0))
            server.kill()
            job.wait_for(run.past(run.images_seen() + 640))
            with paused(
                members(ray_head.process.pid, "ray::RayTrainWorker")
            ):  # so that the run does not finish before
                server.start()
            assert job.wait() == 0, job.output
        assert_same(run, undisturbed)
        assert_tracked_once(run)


@pytest.mark.long
def test_mlflow_is_down_for_the_whole_run_and_synced_later(
    run: Run, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line reports the outage, and the run's end names the command that sends the rest."""
    server = MlflowServer(tmp_path / "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with run.start() as job:
        assert job.wait() == 0, job.output
    assert_same(run, undisturbed)
    assert job.output.count("MLflow at ") - job.output.count("waiting for MLflow at ") == 1
    assert f"`ddpm sync {run.location.uri}`" in job.output

    failed = run_job("sync", run.location.uri, "--timeout-s", "2", cwd=tmp_path)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert len(failed.stderr.splitlines()) == 1 and server.uri in failed.stderr
    with server:
        for _ in range(2):
            done = run_job("sync", run.location.uri, cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
            assert_tracked_once(run)
