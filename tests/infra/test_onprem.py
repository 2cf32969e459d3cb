"""infra/onprem/cluster.yaml, really launched on three hosts with ssh."""

from pathlib import Path

import pyarrow.fs
import pytest
from support.faulted import Run, assert_same, assert_tracked_once
from support.hosts import Hosts
from support.launched import UserHost, cluster_file, environment, install, with_overlay
from support.processes import wait_for
from support.servers import S3Server

from ddpm.runs.storage import resolve


@pytest.mark.slow
@pytest.mark.long
def test_a_run_survives_losing_a_machine(
    hosts: Hosts,
    s3_for_hosts: S3Server,
    mlflow_for_hosts: str,
    digits_uri: str,
    undisturbed: Run,
    tmp_path: Path,
) -> None:
    """Two workers run on two of three machines; one of the two is killed during the run, and the third replaces it.

    The final state is bitwise equal to that of an undisturbed run.
    """
    cpus = {"head": 3, "first": 2, "second": 2}  # a worker takes two CPUs, and one is left for read tasks
    machines = {
        name: hosts.add(name, {"RAY_OVERRIDE_RESOURCES": f'{{"CPU": {count}}}'})
        for name, count in cpus.items()
    }
    for machine in machines.values():
        install(machine)
    head, *workers = machines.values()
    settings = {
        "MLFLOW_TRACKING_URI": mlflow_for_hosts,
        "AWS_ENDPOINT_URL": s3_for_hosts.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    overlay = {
        "provider": {"head_ip": head.address, "worker_ips": [worker.address for worker in workers]},
        "auth": {"ssh_user": "root", "ssh_private_key": str(hosts.key)},
        "file_mounts": {"~/ddpm/cluster.env": str(environment(hosts.folder, settings))},
    }
    user_host = UserHost(hosts, with_overlay(cluster_file("infra/onprem/cluster.yaml"), overlay))
    access_key, secret_key = s3_for_hosts.keys
    keys = {"aws_access_key_id": access_key, "aws_secret_access_key": secret_key}
    user_host.write_credentials(".aws/credentials", "default", keys)
    shards = resolve("s3://lab/digits")
    pyarrow.fs.copy_files(digits_uri, shards.path, destination_filesystem=shards.filesystem)
    run = Run("harmed", "s3://lab/runs", "s3://lab/digits", tmp_path / "job.log")

    user_host.up()
    train = ("python", "jobs/train.py", *run.arguments, "--cluster.cpus-per-worker", "2")
    with user_host.dashboard(), user_host.submit(*train, log=tmp_path / "job.log") as job:
        job.wait_for(run.past(0))
        next(worker for worker in workers if worker.processes("ray::RayTrainWorker")).kill()
        assert job.wait() == 0, job.output
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    user_host.down()
    wait_for(lambda: not head.processes("ray::"))
