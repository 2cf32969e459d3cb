"""cluster.yaml, launched for real: Ray's AWS provider on moto's EC2, whose instances are machines with ssh."""

from pathlib import Path
from typing import Any

import mlflow
import pyarrow.fs
import pytest
from cloud import REGION, Cloud, Launch
from faulted import FLAGS
from hosts import Hosts, answers
from launched import DASHBOARD, Desk, cluster_file, environment, install, overlaid
from servers import S3Server

from ddpm.storage import resolve

ADDRESSES = {"head": "head", "gpu-on-demand": "gpu", "cpu-spot": "cpu"}
"""The machine that stands for the one instance of a kind."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cluster_on_aws_grows_trains_and_is_gone(
    hosts: Hosts, s3_for_hosts: S3Server, mlflow_for_hosts: str, digits_uri: str, tmp_path: Path
) -> None:
    """The head, then a machine for each of two workers; one of them on demand, since there are no GPU spot machines."""
    machines = {name: hosts.add(name) for name in ADDRESSES.values()}
    for machine in machines.values():
        install(machine)
    shards = resolve("s3://lab/digits")
    pyarrow.fs.copy_files(digits_uri, shards.path, destination_filesystem=shards.filesystem)
    with Cloud(tmp_path, hosts.gateway, s3_for_hosts.keys, no_spot=("g5", "g6")) as cloud:
        settings = {
            "MLFLOW_TRACKING_URI": mlflow_for_hosts,
            "DDPM_STORAGE": "s3://lab/runs",
            "AWS_ENDPOINT_URL_S3": s3_for_hosts.endpoint,
            "AWS_ENDPOINT_URL_EC2": cloud.endpoint,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": cloud.endpoint,
        }
        owner = {
            "AWS_ENDPOINT_URL": cloud.endpoint,
            "AWS_ACCESS_KEY_ID": "owner",
            "AWS_SECRET_ACCESS_KEY": "owner",
        }
        desk = Desk(hosts, overlaid(cluster_file("cluster.yaml"), overlay(cloud, hosts, settings)), env=owner)
        desk.make_token()
        desk.up()
        assert not answers(machines["head"].address, 8265)  # but through ssh
        with desk.dashboard():
            refused = desk.host.run("ray", "job", "submit", "--address", DASHBOARD, "--", "id")
            assert refused.returncode != 0 and "uthentic" in refused.stdout + refused.stderr
            # Four GPUs are to be had, says cluster.yaml; here there are none.
            train = ("python", "jobs/train.py", "digits", "--data.shards", "s3://lab/digits", *FLAGS)
            flags = ("--train.total-images", "1280", "--cluster.cpus-per-worker", "2")
            name = ("--run.name", "cloudy", "--cluster.gpu", "False")
            with desk.submit(*train, *flags, *name, log=tmp_path / "job.log") as job:
                assert job.wait(900) == 0, job.output
        assert cloud.launches[0] == Launch("m7i.large", spot=False)
        assert {Launch("g6.xlarge", spot=True), Launch("g5.xlarge", spot=True)} < set(cloud.launches)
        assert Launch("g6.xlarge", spot=False) in cloud.launches
        assert {instance["PrivateIpAddress"] for instance in cloud.instances()} == {
            machine.address for machine in machines.values()
        }
        desk.down()
        assert {instance["State"]["Name"] for instance in cloud.instances()} == {"terminated"}
    assert resolve("s3://lab/runs/cloudy/checkpoint-000000001280/checksums.json").read()
    client = mlflow.MlflowClient(mlflow_for_hosts)
    (experiment,) = (e for e in client.search_experiments() if e.name == "ddpm")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["cluster.num_workers"] == "2"
    for machine in machines.values():
        assert [
            file for file in files(machine.home) if s3_for_hosts.keys[1].encode() in file.read_bytes()
        ] == []


def overlay(cloud: Cloud, hosts: Hosts, settings: dict[str, str]) -> dict[str, Any]:
    """What a user edits, and what differs from AWS: which machines the instances are, and how ssh enters them."""
    ec2, iam = cloud.client("ec2"), cloud.client("iam")
    vpc = ec2.create_vpc(CidrBlock=hosts.network)["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock=hosts.network, AvailabilityZone=f"{REGION}a")
    group = ec2.create_security_group(GroupName="cluster", Description="cluster", VpcId=vpc)["GroupId"]
    profiles = {
        name: iam.create_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Arn"]
        for name in ("head", "worker")
    }
    ec2.import_key_pair(KeyName="hosts", PublicKeyMaterial=hosts.key.with_suffix(".pub").read_bytes())
    kinds = cluster_file("cluster.yaml")["available_node_types"]
    place = {"SubnetIds": [subnet["Subnet"]["SubnetId"]], "SecurityGroupIds": [group], "KeyName": "hosts"}
    types: dict[str, Any] = {}
    for kind in kinds:
        profile = {"Arn": profiles["head" if kind == "head" else "worker"]}
        address = hosts[ADDRESSES.get(kind, "head")].address
        own = {"IamInstanceProfile": profile, "PrivateIpAddress": address}
        types[kind] = {"node_config": place | own}
    for kind in kinds.keys() - {"head"}:  # a machine has three CPUs and no GPU, and each kind one machine
        types[kind] |= {"max_workers": int(kind != "cpu-on-demand"), "resources": {"CPU": 3, "GPU": 0}}
    return {
        "provider": {"region": REGION, "use_internal_ips": True},
        "auth": {"ssh_user": "root", "ssh_private_key": str(hosts.key)},
        "available_node_types": types,
        "file_mounts": {"~/ddpm/cluster.env": str(environment(hosts.folder, settings))},
    }


def files(folder: Path) -> list[Path]:
    """Regular files of a machine's home; links lead to what it shares with this one."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
