"""infra/onprem/cluster.yaml, launched for real on three machines with ssh."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.fs
import pytest
from support.faulted import Run, assert_same, assert_tracked_once
from support.hosts import Host, Hosts
from support.launched import Desk, cluster_file, environment, gone, install, overlaid
from support.servers import S3Server

from ddpm.storage.locations import resolve


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_outlives_one_of_its_machines(
    hosts: Hosts,
    s3_for_hosts: S3Server,
    mlflow_for_hosts: str,
    digits_uri: str,
    undisturbed: Run,
    announce: Callable[[str], None],
    tmp_path: Path,
) -> None:
    """Two workers on two of three machines; one of the two is gone in mid-run, and the third takes over.

    The end is that of a run that nothing happened to, bit for bit.
    """
    cpus = {"head": 3, "first": 2, "second": 2}  # a worker takes two, and one is left for reading data
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
    desk = Desk(hosts, overlaid(cluster_file("infra/onprem/cluster.yaml"), overlay))
    credentials = desk.host.home / ".aws/credentials"
    credentials.parent.mkdir()
    words = zip(("aws_access_key_id", "aws_secret_access_key"), s3_for_hosts.keys, strict=True)
    credentials.write_text("\n".join(["[default]", *map(" = ".join, words)]))
    shards = resolve("s3://lab/digits")
    pyarrow.fs.copy_files(digits_uri, shards.path, destination_filesystem=shards.filesystem)
    run = Run("harmed", "s3://lab/runs", "s3://lab/digits", tmp_path / "job.log")

    desk.make_token()
    desk.up()
    train = ("python", "jobs/train.py", *run.arguments, "--cluster.cpus-per-worker", "2")
    with desk.dashboard(), desk.submit(*train, log=tmp_path / "job.log") as job:
        announce(desk.wait_for_first_step(job))
        job.wait_for(run.past(0), timeout_s=600)
        working(workers).kill()
        assert job.wait(900) == 0, job.output
    assert_same(run, undisturbed)
    assert_tracked_once(run)
    desk.down()
    assert gone(head, "ray::")


def working(machines: list[Host]) -> Host:
    """One that has a worker of the run."""
    return next(machine for machine in machines if machine.processes("ray::RayTrainWorker"))
