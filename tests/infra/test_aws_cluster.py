"""cluster.yaml, really launched: Ray's AWS provider on moto's EC2, with hosts with ssh as instances."""

import uuid
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pyarrow.fs
import pytest
from support import processes
from support.cloud import REGION, AwsServer, Cloud, Launch, make_stack
from support.faulted import FLAGS
from support.guarded import GuardedMlflowServer
from support.hosts import Hosts, answers
from support.launched import DASHBOARD, UserHost, cluster_file, environment, install, with_overlay
from support.servers import S3Server, aws_client

from ddpm.runs.storage import resolve


@pytest.mark.slow
def test_a_cluster_on_aws_scales_up_trains_and_is_terminated(
    hosts: Hosts,
    aws: AwsServer,
    s3_for_hosts: S3Server,
    guarded_mlflow: GuardedMlflowServer,
    digits_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head starts, then a machine for each of two workers; one is on-demand, since GPU spot capacity is missing.

    The first worker's machine is broken, and another one replaces it. They have roles and security group of
    infra/aws/stack.yaml. MLflow needs a password, which is in ~/.mlflow/credentials alone.
    """
    head, broken, *_ = machines = [hosts.add(name) for name in ("head", "broken", "first", "second", "spare")]
    for machine in machines:
        install(machine)
    with (broken.home / ".bashrc").open("a") as file:
        file.write('[[ $BASH_EXECUTION_STRING != *"ray start"* ]] || exit 1\n')
    addresses = [machine.address for machine in machines]
    with Cloud(aws, hosts.gateway, s3_for_hosts.keys, addresses, no_spot=("g5", "g6")) as cloud:
        vpc, subnet = network(aws, hosts)
        stack = make_stack(aws.client, vpc)
        bucket = stack["BucketName"]
        password = uuid.uuid4().hex
        put_data(digits_uri, bucket)
        guarded_mlflow.add_user("on-aws", password)
        settings = {
            "MLFLOW_TRACKING_URI": f"http://{hosts.gateway}:{guarded_mlflow.port}",
            "DDPM_STORAGE": f"s3://{bucket}/runs",
        }
        endpoints = {
            "AWS_ENDPOINT_URL_S3": s3_for_hosts.endpoint,
            "AWS_ENDPOINT_URL_EC2": cloud.uri,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": cloud.uri,
        }
        owner_env, _ = aws_client(cloud.uri, "owner", "owner")
        changes = overlay(aws, hosts.key, stack, subnet)
        changes["file_mounts"] = {
            "~/ddpm/cluster.env": str(environment(hosts.folder, settings | endpoints)),
            "~/.mlflow/credentials": "~/.mlflow/credentials",
        }
        user_host = UserHost(hosts, with_overlay(cluster_file("cluster.yaml"), changes), env=owner_env)
        keys = {"mlflow_tracking_username": "on-aws", "mlflow_tracking_password": password}
        user_host.write_credentials(".mlflow/credentials", "mlflow", keys)
        user_host.up()
        assert not answers(head.address, 8265)  # only reachable through ssh
        with user_host.dashboard():
            # cluster.yaml promises four GPUs; here there are none.
            data = ("--data.shards", f"s3://{bucket}/data/digits")
            train = ("python", "jobs/train.py", "digits", *data, *FLAGS)
            flags = ("--train.total-images", "1280", "--cluster.cpus-per-worker", "2")
            name = ("--run.name", "cloudy", "--run.experiment", "on-aws", "--cluster.gpu", "False")
            with user_host.submit(*train, *flags, *name, log=tmp_path / "job.log") as job:
                assert job.wait(900) == 0, job.output
            launched = {one["PrivateIpAddress"]: one["State"]["Name"] for one in cloud.machines()}
            machines = [machine for machine in machines if machine.address in launched]
            up = [machine for machine in machines if launched[machine.address] == "running"]
            assert len(up) == 3 and broken in machines and broken not in up
            cloud.taken_back.add(up[-1].address)
            told = up[-1].home / "ddpm/notice.log"
            processes.wait_for(lambda: "Ray was told\n" in told.read_text(), 120)
            marked = [(machine.home / "ddpm/taken-back").exists() for machine in up]
            assert marked == [False, False, True]
            refused = user_host.host.run("ray", "job", "submit", "--address", DASHBOARD, "--", "id")
            assert refused.returncode != 0 and "uthentic" in refused.stdout + refused.stderr
        assert cloud.launches[0] == Launch("m7i.large", spot=False)
        assert {Launch("g6.xlarge", spot=True), Launch("g5.xlarge", spot=True)} < set(cloud.launches)
        assert Launch("g6.xlarge", spot=False) in cloud.launches
        profiles = {i["PrivateIpAddress"]: i.get("IamInstanceProfile") for i in cloud.machines()}
        for machine in up:
            kind = "Head" if machine is head else "Worker"
            assert profiles[machine.address]["Arn"] == stack[f"{kind}InstanceProfileArn"]
        groups = {group["GroupId"] for machine in cloud.machines() for group in machine["SecurityGroups"]}
        assert groups == {stack["SecurityGroupId"]}
        user_host.down()
        assert {machine["State"]["Name"] for machine in cloud.machines()} == {"terminated"}
    assert resolve(f"s3://{bucket}/runs/cloudy/checkpoint-000000001280-g1/checksums.json").read()
    for variable, value in guarded_mlflow.client_env("on-aws", password).items():
        monkeypatch.setenv(variable, value)
    client = mlflow.MlflowClient(guarded_mlflow.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("on-aws").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["cluster.num_workers"] == "2", job.output
    assert run.data.metrics["train/loss"] > 0


def network(aws: AwsServer, hosts: Hosts) -> tuple[str, str]:
    """A VPC, and a subnet in it that is the network of the hosts."""
    ec2 = aws.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.231.0.0/16")["Vpc"]["VpcId"]
    place = {"CidrBlock": hosts.network, "AvailabilityZone": f"{REGION}a"}
    return vpc, ec2.create_subnet(VpcId=vpc, **place)["Subnet"]["SubnetId"]


def put_data(digits_uri: str, bucket: str) -> None:
    """Write digits as shards to the bucket, which moto created and the S3 server now creates too."""
    boto3.client("s3").create_bucket(Bucket=bucket)
    shards = resolve(f"s3://{bucket}/data/digits")
    pyarrow.fs.copy_files(digits_uri, shards.path, destination_filesystem=shards.filesystem)


def overlay(aws: AwsServer, key: Path, stack: dict[str, str], subnet: str) -> dict[str, Any]:
    """What a user edits, from the stack's outputs, and what differs from AWS: the ssh key and small machines."""
    public_key = key.with_suffix(".pub").read_bytes()
    aws.client("ec2").import_key_pair(KeyName="hosts", PublicKeyMaterial=public_key)
    kinds = cluster_file("cluster.yaml")["available_node_types"]
    types: dict[str, Any] = {}
    for kind in kinds:
        types[kind] = {
            "node_config": {
                "IamInstanceProfile": {
                    "Arn": stack[f"{'Head' if kind == 'head' else 'Worker'}InstanceProfileArn"]
                },
                "SecurityGroupIds": [stack["SecurityGroupId"]],
                "SubnetIds": [subnet],
                "KeyName": "hosts",
            }
        }
    # A host has three CPUs and no GPU; only one machine may be of a type without GPUs.
    for kind in kinds.keys() - {"head"}:
        types[kind] |= {"max_workers": int(kind != "cpu-on-demand"), "resources": {"CPU": 3, "GPU": 0}}
    return {
        "provider": {"region": REGION, "use_internal_ips": True},
        "auth": {"ssh_user": "root", "ssh_private_key": str(key)},
        "available_node_types": types,
    }
