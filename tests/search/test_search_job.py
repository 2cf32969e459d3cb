"""python tune/search.py from the command line: interrupted, killed, and run to its end."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from support import tracked
from support.processes import Job, members, paused, wait_for
from support.servers import RayHead

from ddpm.config.json import from_json
from ddpm.config.presets import DIGITS
from ddpm.evaluation import rung
from ddpm.runs import checkpoint, run_folder, storage
from ddpm.runs.run_folder import RunStatus
from ddpm.search.trials import Trial, Trials
from ddpm.tracking.mlflow_client import tracking_uri

TINY = """--schedule.num-timesteps 30 --model.base-width 8 --model.width-multipliers 1 2 --model.norm-groups 4
    --train.total-images 1920 --train.batch-size 64 --train.micro-batch-size 64 --train.log-every-images 640
    --train.sample-every-images 1920 --train.held-out-images 20
    --sample.num-images 4 --sample.num-sample-steps 4"""
# A good trial, one that fails because of its learning rate, and one that is worse than the first and is stopped; then
# the first again, with another seed.
FLAGS = f"""digits --name s --searcher grid --num-trials 3 --max-concurrent 1 --num-rungs 2 --num-images 60
    --finalists 1 --finalist-seeds 2 --drawn-images 40 --features pixels --run.experiment killed
    --space schedule.kind=cosine|linear optim.lr=2e-3|1e30 {TINY}""".split()
# Two trials. The second has the lower bound at the first rung, so that both are trained to the end.
TWO_TRIALS = f"""digits --name s --searcher grid --num-trials 2 --max-concurrent 1 --num-rungs 2 --num-images 20
    --finalists 0 --run.experiment deaths --space optim.lr=2e-3|1e-6 {TINY}""".split()
# Two trials of two workers; the second is worse than the first, and is stopped.
GROUPS = f"""digits --name s --searcher grid --num-trials 2 --max-concurrent 1 --num-rungs 2 --num-images 60
    --finalists 0 --space schedule.kind=cosine|linear optim.lr=2e-3 {TINY} --train.micro-batch-size 32
    --cluster.num-workers 2 --cluster.threads-per-worker 1""".split()
TRIAL = "ray::ImplicitFunc"
"""Title of the process of a trial with one worker."""


def trials_in(folder: Path) -> list[Trial]:
    """The trials of the search in `folder`."""
    place = folder / "runs" / "s"
    if not (place / "search.json").exists():
        return []
    return Trials(storage.resolve(str(place))).all()


def leaderboard(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "runs" / "s" / "results.parquet").to_pylist()


@pytest.mark.slow
@pytest.mark.long
def test_a_search_interrupted_and_killed_ends_with_the_same_leaderboard(
    run_job: Callable[..., Any], ray_head: RayHead, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    undisturbed = tmp_path / "undisturbed"
    killed.mkdir()
    place = killed / "runs" / "s"
    with Job("search", *FLAGS, log=killed / "job.log") as job:
        job.wait_for(lambda: [*place.glob("digits-*/checkpoint-000000000640-g1/checksums.json")])
        with paused(job.members(TRIAL)):
            second = run_job("search", *FLAGS, cwd=killed)
            assert second.returncode == 2 and "another process drives this search" in second.stderr
            descendants = psutil.Process(job.process.pid).children(recursive=True)
            job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 128 + signal.SIGTERM, job.output
        assert "run the same command again with --name s" in job.output
        assert "Traceback" not in job.output
        assert psutil.wait_procs(descendants, timeout=300)[1] == []
    assert "RUNNING" not in {run.info.status for run in mlflow_runs(place)}
    assert not trials_in(killed)[-1].has_ended

    for num_trials in (2, 4):
        with Job("search", *FLAGS, log=killed / "job.log") as job:
            job.wait_for(lambda wanted=num_trials: len(trials_in(killed)) == wanted)

    with Job("search", *FLAGS, log=killed / "job.log") as job:
        assert job.wait() == 0, job.output
        output = job.output
    found = trials_in(killed)
    assert [(trial.status, len(trial.rungs)) for trial in found] == [
        (RunStatus.FINISHED, 2),
        (RunStatus.FAILED, 0),
        (RunStatus.PRUNED, 1),
        (RunStatus.FINISHED, 2),
    ]
    assert (found[3].repeats, found[3].changes) == (found[0].name, {**found[0].changes, "train.seed": 1})
    assert "the loss or the gradient is not finite" in found[1].reason
    assert found[0].name in output and "Traceback" not in output

    for name in ("results.md", "parallel.png", "bits-and-kid.png"):
        assert (place / name).stat().st_size > 0
    page = (place / "comparison.html").read_text()
    assert page.count('<figure class="grid">') == 2 and found[1].name not in page  # it was never evaluated
    assert "means of several trainings" in page and "train/loss over images seen" in page
    assert [row["rank_by_trainings"] for row in leaderboard(killed)] == ["1", None, None, None]
    best = from_json((place / "best.json").read_text(), "best.json", DIGITS)
    assert (best.schedule.kind, best.optim.lr, best.train.total_images) == ("cosine", 2e-3, 1920)
    check_mlflow(place, found)

    shutil.copytree(killed / "runs" / "data", undisturbed / "runs" / "data")
    env = {"RAY_ADDRESS": ray_head.address}
    with Job("search", *FLAGS, log=undisturbed / "job.log", env=env) as job:
        assert job.wait() == 0, job.output
    assert leaderboard(killed) == leaderboard(undisturbed)


def mlflow_runs(place: Path) -> list[Run]:
    """The search's own MLflow run, followed by its children."""
    key = Trials(storage.resolve(str(place))).file.search_key
    parent = tracked.run_with_key(tracking_uri(), key)
    of_parent = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    client = MlflowClient(tracking_uri())
    return [parent, *client.search_runs([parent.info.experiment_id], of_parent)]


def check_mlflow(place: Path, trials: list[Trial]) -> None:
    """MLflow has a parent run with a child for each of the four trials, which has its status."""
    parent, *children = mlflow_runs(place)
    status = {run.info.run_name: run.info.status for run in children}
    expected = ("FINISHED", "FAILED", "KILLED", "FINISHED")
    assert status == {trial.name: of for trial, of in zip(trials, expected, strict=True)}
    assert parent.info.status == "FINISHED"
    files = MlflowClient(tracking_uri()).list_artifacts(parent.info.run_id)
    assert "comparison.html" in {file.path for file in files}


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_goes_on_and_a_search_that_has_ended_has_nothing_to_do(
    ray_head: RayHead, tmp_path: Path
) -> None:
    place = tmp_path / "runs" / "s"
    env = {"RAY_ADDRESS": ray_head.address}
    with Job("search", *TWO_TRIALS, log=tmp_path / "first.log", env=env) as job:
        (stored,) = job.wait_for(lambda: [*place.glob("digits-*/checkpoint-000000000640-g1/checksums.json")])
        killed = stored.parents[1]
        measured = killed / rung.file_name(640)
        measured_ns = measured.stat().st_mtime_ns
        (process,) = members(ray_head.process.pid, TRIAL)
        process.kill()
        assert job.wait() == 0, job.output
        output = job.output
    found = trials_in(tmp_path)
    assert found[0].name == killed.name and "Traceback" not in output
    for trial in found:
        assert trial.status == RunStatus.FINISHED
        assert [evaluation.images_seen for evaluation in trial.rungs] == [640, 1920]
        (last,) = (place / trial.name).glob("checkpoint-000000001920-*")
        assert (last / checkpoint.CHECKSUMS).exists()
        assert output.count(f"{trial.name} after 640 images") == 1
    assert measured.stat().st_mtime_ns == measured_ns

    with Job("search", *TWO_TRIALS, log=tmp_path / "second.log", env=env) as job:
        assert job.wait() == 0, job.output
        assert not any(
            f"{trial.name} {what}" in job.output for trial in found for what in ("begins", "resumes")
        )
    assert trials_in(tmp_path) == found


@pytest.mark.slow
def test_a_stopped_trial_of_several_workers_leaves_nothing(ray_head: RayHead, tmp_path: Path) -> None:
    """No process, and no database in the folder where Tune runs it: the driver alone pushes."""
    env = {"RAY_ADDRESS": ray_head.address, "MLFLOW_TRACKING_URI": ""}
    with Job("search", *GROUPS, log=tmp_path / "job.log", env=env) as job:
        assert job.wait() == 0, job.output
    finished, stopped = trials_in(tmp_path)
    assert (finished.status, stopped.status) == (RunStatus.FINISHED, RunStatus.PRUNED)
    folder = storage.resolve(str(tmp_path / "runs" / "s" / stopped.name))
    status = run_folder.read_status(folder)
    assert status is not None and status.status == RunStatus.PRUNED
    assert run_folder.checkpoints(folder)
    for title in ("ray::GroupTrial", "ray::RayTrainWorker", "ray::TrainController"):
        wait_for(lambda title=title: not members(ray_head.process.pid, title))
    assert [*ray_head.temp_dir.rglob("mlflow.db")] == []
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("ddpm").experiment_id])
    assert {run.info.run_name: run.info.status for run in found} == {
        "s": "FINISHED",
        finished.name: "FINISHED",
        stopped.name: "KILLED",
    }


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray_head")
@pytest.mark.lowest
def test_a_search_of_few_timesteps_without_tracking(run_job: Callable[..., Any], tmp_path: Path) -> None:
    """The finalist is sampled in its 12 steps, and MLflow gets nothing."""
    flags = """digits --name s --num-trials 1 --max-concurrent 1 --num-rungs 1 --num-images 40 --finalists 1
        --drawn-images 40 --features pixels --run.tracking none --space optim.lr=2e-3""".split()
    env = {"MLFLOW_TRACKING_URI": ""}
    done = run_job("search", *flags, *TINY.split(), "--schedule.num-timesteps", "12", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MLflow" not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir() if "mlflow" in path.name or path.name == "mlruns"] == []
    (row,) = leaderboard(tmp_path)
    assert row["kid"] is not None and row["rank_by_kid"] == "1"
    (line,) = [line for line in done.stdout.splitlines() if "chosen" in line]
    assert row["trial"] in line and line in (tmp_path / "runs/s/results.md").read_text()
    status = run_folder.read_status(storage.resolve(str(tmp_path / "runs/s" / row["trial"])))
    assert status is not None and status.status == RunStatus.FINISHED


def test_a_user_error_is_one_line_and_nothing_is_written(
    user_error: Callable[..., str], tmp_path: Path
) -> None:
    refused = user_error("search", "digits", "--searcher", "grid")
    assert refused.startswith("--searcher grid ")
    assert list(tmp_path.iterdir()) == []
