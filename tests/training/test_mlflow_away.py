"""MLflow comes late, goes away and comes back after the end: training goes on, and at last everything is there once."""

from pathlib import Path

import pytest
from support.faulted import Run, assert_same, assert_tracked_once, segments
from support.processes import members, paused, run_job
from support.servers import MlflowServer, RayHead


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
def test_it_comes_late_is_killed_and_told_the_rest_later(
    run: Run, undisturbed: Run, ray_head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = MlflowServer(tmp_path / "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with run.start() as job:
        job.wait_for(run.past(0))
        assert segments(run)  # they wait
        with paused(members(ray_head.process.pid, "ray::RayTrainWorker")):  # the run is not over before
            server.start()
            job.wait_for(lambda: not segments(run))
        server.kill()
        assert job.wait() == 0, job.output
    assert_same(run, undisturbed)
    kept = len(segments(run))
    assert kept > 0
    assert (
        f"are kept in {run.location.uri}/tracking, and `python jobs/sync.py {run.location.uri}`" in job.output
    )

    away = run_job("sync", run.location.uri, "--timeout-s", "2", cwd=tmp_path)
    assert away.returncode == 1 and "cannot be reached" in away.stderr and "Traceback" not in away.stderr
    assert len(segments(run)) == kept
    with server:
        for _ in range(2):
            done = run_job("sync", run.location.uri, cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
            assert_tracked_once(run)
