"""infra/aws/stack.yaml: created on a server that emulates AWS, and the permissions of its roles."""

import base64
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import cfnlint.decode
import pytest
import requests
from botocore.exceptions import ClientError
from support import processes
from support.cloud import TEMPLATE, AwsServer, make_stack
from support.guarded import GuardedMlflowServer
from support.permissions import allowed, policies_of

TRUST = {"Service": "ec2.amazonaws.com"}


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AwsServer]:
    with AwsServer(tmp_path_factory.mktemp("aws")) as server:
        yield server


@pytest.fixture(scope="module")
def client(aws: AwsServer) -> Iterator[Callable[[str], Any]]:
    """Returns clients of services, with the account owner's permissions."""
    clients = {}

    def of(service: str) -> Any:
        return clients.setdefault(service, boto3.client(service, **aws.client_options))

    yield of
    for opened in clients.values():
        opened.close()


@pytest.fixture(scope="module")
def outputs(client: Callable[[str], Any]) -> dict[str, str]:
    """Outputs of the stack, created in the account's default network."""
    subnets = client("ec2").describe_subnets()["Subnets"]
    return make_stack(client, subnets[0]["VpcId"], [subnet["SubnetId"] for subnet in subnets[:2]])


@pytest.fixture(scope="module")
def resources(outputs: dict[str, str], client: Callable[[str], Any]) -> dict[str, str]:
    """Name in the template -> physical ID."""
    found = client("cloudformation").describe_stack_resources(StackName="ddpm")["StackResources"]
    return {
        resource["LogicalResourceId"]: resource["PhysicalResourceId"]
        for resource in found
        if "PhysicalResourceId" in resource  # moto also lists resources that it did not create
    }


@pytest.fixture(scope="module")
def policies(resources: dict[str, str], client: Callable[[str], Any]) -> dict[str, list[str]]:
    """The policies of each role, as IAM has them."""
    iam, found = client("iam"), {}
    for name in ("WorkerRole", "HeadRole", "MlflowRole"):
        role = resources[name]
        found[name] = policies_of(iam, role)
        trust = iam.get_role(RoleName=role)["Role"]["AssumeRolePolicyDocument"]
        assert [statement["Principal"] for statement in trust["Statement"]] == [TRUST]
    return found


def secret(name: str) -> str:
    """The ARN of a secret of the stack; moto 5.2.5 creates none, and AWS appends six random letters."""
    return f"arn:aws:secretsmanager:us-east-1:123456789012:secret:ddpm/mlflow-{name}-AbCdEf"


def test_the_template_passes_cfn_lint() -> None:
    done = processes.run([processes.program("cfn-lint"), TEMPLATE], cwd=processes.REPO)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_the_outputs_have_what_a_cluster_needs(
    outputs: dict[str, str], resources: dict[str, str], client: Callable[[str], Any]
) -> None:
    iam = client("iam")
    for role in ("Head", "Worker"):
        profile = iam.get_instance_profile(InstanceProfileName=resources[f"{role}Profile"])["InstanceProfile"]
        assert profile["Arn"] == outputs[f"{role}InstanceProfileArn"]
        assert [r["RoleName"] for r in profile["Roles"]] == [resources[f"{role}Role"]]
    assert outputs["SecurityGroupId"] == resources["ClusterSecurityGroup"]
    assert re.fullmatch(r"http://[\d.]+:5000", outputs["MlflowUri"])
    assert outputs["TrainerSecret"] == "ddpm/mlflow-trainer"


def test_the_bucket_is_private_encrypted_and_versioned(
    outputs: dict[str, str], client: Callable[[str], Any]
) -> None:
    s3, bucket = client("s3"), {"Bucket": outputs["BucketName"]}
    (rule,) = s3.get_bucket_encryption(**bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    # Of a bucket's properties moto 5.2.5 applies only the encryption.
    template, errors = cfnlint.decode.decode_str(TEMPLATE.read_text())
    assert not errors
    said = template["Resources"]["Bucket"]["Properties"]
    assert said["VersioningConfiguration"]["Status"] == "Enabled"
    assert all(said["PublicAccessBlockConfiguration"].values())
    (statement,) = template["Resources"]["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    in_the_clear = {"Bool": {"aws:SecureTransport": "false"}}
    assert (statement["Effect"], statement["Condition"]) == ("Deny", in_the_clear)
    rules = {rule["Id"]: rule for rule in said["LifecycleConfiguration"]["Rules"]}
    assert rules["deleted-files"]["NoncurrentVersionExpiration"]["NoncurrentDays"] == {
        "Ref": "DaysOfDeletedFiles"
    }
    assert not any("ExpirationInDays" in rule for rule in rules.values())  # only deleted files expire


def test_no_port_is_open_to_the_internet(resources: dict[str, str], client: Callable[[str], Any]) -> None:
    ours = [resources[f"{name}SecurityGroup"] for name in ("Cluster", "Mlflow", "Database")]
    groups = client("ec2").describe_security_groups(GroupIds=ours)["SecurityGroups"]
    open_ports = {
        (group["GroupId"], rule.get("FromPort", -1), *sources)
        for group in groups
        for rule in group["IpPermissions"]
        if (
            sources := [
                *(pair["GroupId"] for pair in rule["UserIdGroupPairs"]),
                *(address["CidrIp"] for address in rule["IpRanges"] + rule.get("Ipv6Ranges", [])),
            ]
        )
    }
    cluster, mlflow, database = ours
    assert open_ports == {
        (cluster, 22, "203.0.113.7/32"),
        (cluster, -1, cluster),
        (mlflow, 5000, cluster),
        (database, 5432, mlflow),
    }


def test_ssh_from_everywhere_cannot_be_chosen(outputs: dict[str, str]) -> None:
    pattern = re.search(r'AllowedPattern: "(.*)"', TEMPLATE.read_text())
    assert pattern is not None
    matches = re.compile(pattern[1].replace("\\\\", "\\")).match
    assert matches("203.0.113.7/32")
    assert not matches("0.0.0.0/0")


def test_the_database_is_encrypted_and_not_public(
    resources: dict[str, str], client: Callable[[str], Any]
) -> None:
    (database,) = client("rds").describe_db_instances()["DBInstances"]
    assert (database["Engine"], database["StorageEncrypted"], database["PubliclyAccessible"]) == (
        "postgres",
        True,
        False,
    )


def boot_script(resources: dict[str, str], client: Callable[[str], Any]) -> str:
    """The boot script of the MLflow server's instance."""
    said = client("ec2").describe_instance_attribute(
        InstanceId=resources["MlflowServer"], Attribute="userData"
    )["UserData"]["Value"]
    return base64.b64decode(said).decode()


def test_mlflow_starts_as_in_infra_mlflow_serve(
    resources: dict[str, str], outputs: dict[str, str], client: Callable[[str], Any]
) -> None:
    """The instance has the script's settings and command, and no password."""
    boot = boot_script(resources, client)
    serve = (processes.REPO / "infra/mlflow/serve").read_text()
    for setting in ("MLFLOW_BACKEND_STORE_URI=postgresql+psycopg://", "mlflow server --app-name basic-auth"):
        assert setting in serve
        assert setting in boot
    for line in (processes.REPO / "infra/mlflow/auth.ini").read_text().splitlines():
        assert line.startswith(";") or line in boot
    assert f"MLFLOW_ARTIFACTS_DESTINATION=s3://{outputs['BucketName']}/mlflow" in boot
    for password in re.findall(r"\b\w*(?:PASSWORD|SECRET_KEY)=.*", boot):
        assert "=$(secret ddpm/mlflow-" in password


@pytest.mark.slow
def test_the_boot_script_creates_the_trainer_user(
    resources: dict[str, str],
    client: Callable[[str], Any],
    guarded_mlflow: GuardedMlflowServer,
    tmp_path: Path,
) -> None:
    """As on the instance, except for the port, the user's name, and the program that returns passwords."""
    boot = boot_script(resources, client)
    (script,) = re.findall(
        r"^cat > /opt/mlflow/let-trainer-in <<'END'\n(.*?)^END$", boot, re.MULTILINE | re.DOTALL
    )
    port = guarded_mlflow.uri.rpartition(":")[2]
    (tmp_path / "let-in").write_text(script.replace(":5000", f":{port}").replace('"trainer', '"booted'))
    (tmp_path / "aws").write_text(
        '#!/bin/bash\n[[ "$*" == *mlflow-admin* ]] && echo "$ADMIN" || echo "$TRAINER"\n'
    )
    (tmp_path / "aws").chmod(0o755)
    env = {"ADMIN": guarded_mlflow.admin_password, "TRAINER": "a-password-of-aws"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = processes.run(["bash", tmp_path / "let-in"], cwd=tmp_path, env=env | {"PATH": path})
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    url = f"{guarded_mlflow.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    statuses = [
        requests.get(url, auth=("booted", password), timeout=30).status_code
        for password in ("a-password-of-aws", "another-password")
    ]
    assert statuses == [200, 401]


OBJECTS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
NEVER = (
    "s3:DeleteObjectVersion s3:DeleteBucket s3:PutBucketPolicy s3:PutBucketVersioning s3:PutObjectAcl "
    "s3:PutLifecycleConfiguration iam:CreateUser iam:CreateAccessKey iam:PutRolePolicy iam:AttachRolePolicy "
    "sts:AssumeRole secretsmanager:PutSecretValue secretsmanager:ListSecrets kms:Decrypt "
    "ec2:AuthorizeSecurityGroupIngress ec2:CreateKeyPair ec2:ModifyInstanceAttribute lambda:CreateFunction "
    "rds:DescribeDBInstances cloudformation:UpdateStack"
).split()


@pytest.mark.parametrize("role", ["WorkerRole", "HeadRole"])
def test_roles_allow_what_jobs_need(
    role: str, policies: dict[str, list[str]], outputs: dict[str, str], client: Callable[[str], Any]
) -> None:
    bucket = f"arn:aws:s3:::{outputs['BucketName']}"
    for action, prefix in itertools.product(OBJECTS, ("data", "runs", "drawn")):
        assert allowed(policies[role], action, f"{bucket}/{prefix}/a/b"), (action, prefix)
    assert allowed(policies[role], "s3:ListBucket", bucket)  # head_bucket and every listing need it
    assert allowed(policies[role], "secretsmanager:GetSecretValue", secret("trainer"))


@pytest.mark.parametrize("role", ["WorkerRole", "HeadRole", "MlflowRole"])
def test_roles_allow_nothing_else(
    role: str, policies: dict[str, list[str]], outputs: dict[str, str], resources: dict[str, str]
) -> None:
    bucket = f"arn:aws:s3:::{outputs['BucketName']}"
    elsewhere = ["*", "arn:aws:s3:::another", "arn:aws:s3:::another/data/a", bucket, f"{bucket}/data/a"]
    for action, resource in itertools.product(NEVER, [*elsewhere, *outputs.values()]):
        assert not allowed(policies[role], action, resource), (action, resource)
    for action in OBJECTS:
        assert not allowed(policies[role], action, "arn:aws:s3:::another/data/a")
        assert not allowed(policies[role], action, f"{bucket}/elsewhere/a")
    prefixes = ("data", "runs", "drawn") if role == "MlflowRole" else ("mlflow",)
    for action, prefix in itertools.product(OBJECTS, prefixes):
        assert not allowed(policies[role], action, f"{bucket}/{prefix}/a"), (action, prefix)
    if role != "MlflowRole":
        for name in ("admin", "database", "forms"):
            assert not allowed(policies[role], "secretsmanager:GetSecretValue", secret(name))


def test_only_the_head_may_start_and_terminate_workers(
    policies: dict[str, list[str]], resources: dict[str, str], client: Callable[[str], Any]
) -> None:
    account = client("sts").get_caller_identity()["Account"]
    here = f"arn:aws:ec2:us-east-1:{account}"
    workers = client("iam").get_role(RoleName=resources["WorkerRole"])["Role"]["Arn"]
    mlflows = client("iam").get_role(RoleName=resources["MlflowRole"])["Role"]["Arn"]
    ray_node = {"aws_ResourceTag__ray-node-type": "worker"}
    allowed_calls = [
        ("ec2:DescribeInstances", "*", {}),
        ("ec2:RunInstances", f"{here}:instance/*", {}),
        ("ec2:RunInstances", f"{here}:security-group/{resources['ClusterSecurityGroup']}", {}),
        ("ssm:GetParameters", "arn:aws:ssm:us-east-1::parameter/aws/service/deeplearning/ami", {}),
        ("ec2:CreateTags", f"{here}:instance/i-1", {}),
        ("ec2:TerminateInstances", f"{here}:instance/i-1", ray_node),
        ("iam:PassRole", workers, {"iam_PassedToService": "ec2.amazonaws.com"}),
    ]
    denied_calls = [
        ("ec2:RunInstances", f"{here}:security-group/sg-of-others", {}),
        ("ssm:GetParameters", f"arn:aws:ssm:us-east-1:{account}:parameter/password", {}),
        ("ec2:TerminateInstances", f"{here}:instance/i-of-others", {}),
        ("iam:PassRole", workers, {"iam_PassedToService": "lambda.amazonaws.com"}),
        ("iam:PassRole", mlflows, {"iam_PassedToService": "ec2.amazonaws.com"}),
    ]
    assert [allowed(policies["HeadRole"], a, r, **context) for a, r, context in allowed_calls] == [
        True
    ] * len(allowed_calls)
    assert not any(allowed(policies["HeadRole"], a, r, **context) for a, r, context in denied_calls)
    for role in ("WorkerRole", "MlflowRole"):
        assert not any(
            allowed(policies[role], a, r, **context) for a, r, context in allowed_calls + denied_calls
        )


def test_permissions_of_a_worker_on_the_real_bucket(
    aws: AwsServer, outputs: dict[str, str], resources: dict[str, str], client: Callable[[str], Any]
) -> None:
    """With credentials of the role, on a server that now enforces IAM."""
    arn = client("iam").get_role(RoleName=resources["WorkerRole"])["Role"]["Arn"]
    keys = client("sts").assume_role(RoleArn=arn, RoleSessionName="worker")["Credentials"]
    worker = boto3.client(
        "s3",
        endpoint_url=aws.endpoint,
        region_name="us-east-1",
        aws_access_key_id=keys["AccessKeyId"],
        aws_secret_access_key=keys["SecretAccessKey"],
        aws_session_token=keys["SessionToken"],
    )
    bucket = outputs["BucketName"]
    aws.check_permissions(True)
    try:
        worker.put_object(Bucket=bucket, Key="runs/a/state.json", Body=b"{}")
        assert worker.get_object(Bucket=bucket, Key="runs/a/state.json")["Body"].read() == b"{}"
        assert worker.list_objects_v2(Bucket=bucket, Prefix="runs/")["KeyCount"] == 1
        worker.delete_object(Bucket=bucket, Key="runs/a/state.json")
        with pytest.raises(ClientError, match="AccessDenied"):
            worker.put_object(Bucket=bucket, Key="mlflow/a", Body=b"")
        with pytest.raises(ClientError, match="AccessDenied"):
            worker.delete_bucket(Bucket=bucket)
    finally:
        aws.check_permissions(False)
        worker.close()
