"""Tests of the test servers: they store data, check credentials, and answer a browser."""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import mlflow
import psutil
import pyarrow.fs
import pytest
from botocore.exceptions import ClientError
from support import processes, servers


def processes_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.cwd() == str(folder):
                found.append(process)
    return found


def test_s3_round_trip(s3_bucket: str) -> None:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(s3_bucket + "/folder/file")
    data = bytes(range(256)) * 4096
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)
    with filesystem.open_input_stream(path) as stream:
        assert stream.read() == data
    body = (
        boto3.client("s3")
        .get_object(Bucket=s3_bucket.removeprefix("s3://"), Key="folder/file")["Body"]
        .read()
    )
    assert body == data


def test_s3_refuses_a_wrong_secret(s3_bucket: str) -> None:
    stranger = boto3.client("s3", aws_access_key_id="lab", aws_secret_access_key="wrong")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        stranger.list_objects_v2(Bucket=s3_bucket.removeprefix("s3://"))


def test_s3_keeps_its_data_after_a_kill(tmp_path: Path) -> None:
    with servers.S3Server(tmp_path) as server:
        keys = {"aws_access_key_id": "lab", "aws_secret_access_key": "labsecret"}
        client = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="kept")
        client.put_object(Bucket="kept", Key="k", Body=b"v")
        server.kill()
        server.start()
        assert client.get_object(Bucket="kept", Key="k")["Body"].read() == b"v"


def test_mlflow_logs_a_metric_and_an_artifact(mlflow_server: str, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("hello")
    client = mlflow.MlflowClient(mlflow_server)
    run_id = client.create_run(client.create_experiment("servers")).info.run_id
    client.log_metric(run_id, "loss", 0.25, step=3)
    client.log_artifact(run_id, str(tmp_path / "note.txt"))
    (metric,) = client.get_metric_history(run_id, "loss")
    assert (metric.value, metric.step) == (0.25, 3)
    assert Path(client.download_artifacts(run_id, "note.txt", str(tmp_path / ".."))).read_text() == "hello"


def test_browser_shows_the_mlflow_page(mlflow_server: str, browser: Any) -> None:
    page = browser.new_page()
    page.goto(mlflow_server)
    page.get_by_text("Experiments").first.wait_for()
    assert "MLflow" in page.title()
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("address", ["None", "'local'"])
def test_another_ray_init_does_not_join_the_head(
    ray_head: servers.RayHead, tmp_path: Path, address: str
) -> None:
    init = f"ray.init(address={address}, num_cpus=1, object_store_memory=10**8)"
    code = f"import ray; print('at', {init}['gcs_address'])"
    done = processes.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "at " in done.stdout
    assert ray_head.address not in done.stdout


def test_a_failed_start_reports_the_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no disk'); raise SystemExit(3)"]
    server = servers.Server("broken", command, "http://127.0.0.1:9/", tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)broken ended with code 3 .*no disk"):
        server.start()


def test_a_server_that_does_not_answer_is_killed(tmp_path: Path) -> None:
    server = servers.Server("mute", ["sleep", "1000"], "http://127.0.0.1:9/", tmp_path)
    with pytest.raises(RuntimeError, match=r"mute gave no answer in 1 s"):
        server.start(timeout_s=1)
    assert server.process is None


def test_stop_reaches_descendants_in_sessions_of_their_own(tmp_path: Path) -> None:
    popen = "subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    code = f"import subprocess; print({popen}.pid, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        processes.kill_tree(parent)
    processes.wait_for(lambda: not psutil.pid_exists(child))


@pytest.mark.slow
def test_a_stopped_server_leaves_no_process_and_starts_again_with_its_data(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    with servers.MlflowServer(folder) as server:
        experiment = mlflow.MlflowClient(server.uri).create_experiment("kept")
        assert processes_in(folder)
        server.stop()
        assert not processes_in(folder)
        server.start()
        assert mlflow.MlflowClient(server.uri).get_experiment(experiment).name == "kept"


def test_a_hanging_job_is_killed_and_its_output_is_shown(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"(?s)not done in 1 s.*thinking"):
        processes.run(
            [sys.executable, "-uc", "print('thinking'); import time; time.sleep(99)"],
            cwd=tmp_path,
            timeout_s=1,
        )
