"""infra/aws on a server that emulates AWS: the stack, the permissions of its roles, and passwords from its secrets."""

import base64
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import cfnlint.decode
import notice
import pytest
from botocore.exceptions import ClientError
from support import processes
from support.cloud import TEMPLATE, AwsServer, Cloud, make_stack
from support.guarded import GuardedMlflowServer
from support.permissions import allowed, policies_of
from support.servers import LOOPBACK, aws_client

ROLES = ("WorkerRole", "HeadRole", "MlflowRole")
PREFIXES = ("data", "runs", "drawn")
OBJECTS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
NEVER = (
    "s3:DeleteObjectVersion s3:DeleteBucket s3:PutBucketPolicy s3:PutBucketVersioning s3:PutObjectAcl "
    "s3:PutLifecycleConfiguration iam:CreateUser iam:CreateAccessKey iam:PutRolePolicy iam:AttachRolePolicy "
    "sts:AssumeRole secretsmanager:PutSecretValue secretsmanager:ListSecrets kms:Decrypt "
    "ec2:AuthorizeSecurityGroupIngress ec2:CreateKeyPair ec2:ModifyInstanceAttribute lambda:CreateFunction "
    "rds:DescribeDBInstances cloudformation:UpdateStack"
).split()
ASK = (sys.executable, "-c", "import os; print(os.environ.get('MLFLOW_TRACKING_PASSWORD'))")


@dataclass
class Stack:
    """infra/aws/stack.yaml, created in the account's default network."""

    client: Callable[[str], Any]
    """Returns clients of services, with the account owner's permissions."""
    outputs: dict[str, str]
    resources: dict[str, str]
    """Name in the template -> physical ID."""

    @property
    def bucket(self) -> str:
        return self.outputs["BucketName"]

    def role(self, name: str) -> Any:
        return self.client("iam").get_role(RoleName=self.resources[name])["Role"]


@pytest.fixture(scope="module")
def stack(aws: AwsServer) -> Stack:
    subnets = aws.client("ec2").describe_subnets()["Subnets"]
    outputs = make_stack(aws.client, subnets[0]["VpcId"], [subnet["SubnetId"] for subnet in subnets[:2]])
    found = aws.client("cloudformation").describe_stack_resources(StackName="ddpm")["StackResources"]
    made = [resource for resource in found if "PhysicalResourceId" in resource]  # moto lists others too
    return Stack(aws.client, outputs, {r["LogicalResourceId"]: r["PhysicalResourceId"] for r in made})


@pytest.fixture(scope="module")
def policies(stack: Stack) -> dict[str, list[str]]:
    """The policies of each role, as IAM has them."""
    for name in ROLES:
        statements = stack.role(name)["AssumeRolePolicyDocument"]["Statement"]
        assert [statement["Principal"] for statement in statements] == [{"Service": "ec2.amazonaws.com"}]
    return {name: policies_of(stack.client("iam"), stack.resources[name]) for name in ROLES}


def secret(name: str) -> str:
    """The ARN of a secret of the stack; moto 5.2.5 creates none, and AWS appends six random letters."""
    return f"arn:aws:secretsmanager:us-east-1:123456789012:secret:ddpm/mlflow-{name}-AbCdEf"


def test_the_template_passes_cfn_lint() -> None:
    done = processes.run([processes.program("cfn-lint"), TEMPLATE], cwd=processes.REPO)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_the_outputs_have_what_a_cluster_needs(stack: Stack) -> None:
    iam, outputs, resources = stack.client("iam"), stack.outputs, stack.resources
    for role in ("Head", "Worker"):
        profile = iam.get_instance_profile(InstanceProfileName=resources[f"{role}Profile"])["InstanceProfile"]
        assert profile["Arn"] == outputs[f"{role}InstanceProfileArn"]
        assert [r["RoleName"] for r in profile["Roles"]] == [resources[f"{role}Role"]]
    assert outputs["SecurityGroupId"] == resources["ClusterSecurityGroup"]
    assert re.fullmatch(r"http://[\d.]+:5000", outputs["MlflowUri"])
    assert outputs["TrainerSecret"] == "ddpm/mlflow-trainer"


def test_the_bucket_is_private_encrypted_and_versioned(stack: Stack) -> None:
    encryption = stack.client("s3").get_bucket_encryption(Bucket=stack.bucket)
    (rule,) = encryption["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    # Of a bucket's properties moto 5.2.5 applies only the encryption.
    template, errors = cfnlint.decode.decode_str(TEMPLATE.read_text())
    assert not errors
    properties = template["Resources"]["Bucket"]["Properties"]
    assert properties["VersioningConfiguration"]["Status"] == "Enabled"
    assert all(properties["PublicAccessBlockConfiguration"].values())
    (statement,) = template["Resources"]["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    in_the_clear = {"Bool": {"aws:SecureTransport": "false"}}
    assert (statement["Effect"], statement["Condition"]) == ("Deny", in_the_clear)
    rules = {rule["Id"]: rule for rule in properties["LifecycleConfiguration"]["Rules"]}
    days = rules["deleted-files"]["NoncurrentVersionExpiration"]["NoncurrentDays"]
    assert days == {"Ref": "DaysOfDeletedFiles"}
    assert not any("ExpirationInDays" in rule for rule in rules.values())  # only deleted files expire


def test_no_port_is_open_to_the_internet(stack: Stack) -> None:
    cluster, mlflow, database = ours = [
        stack.resources[f"{name}SecurityGroup"] for name in ("Cluster", "Mlflow", "Database")
    ]
    open_ports = set()
    for group in stack.client("ec2").describe_security_groups(GroupIds=ours)["SecurityGroups"]:
        for rule in group["IpPermissions"]:
            addresses = rule["IpRanges"] + rule.get("Ipv6Ranges", [])
            sources = [pair["GroupId"] for pair in rule["UserIdGroupPairs"]]
            for source in sources + [address["CidrIp"] for address in addresses]:
                open_ports.add((group["GroupId"], rule.get("FromPort", -1), source))
    assert open_ports == {
        (cluster, 22, "203.0.113.7/32"),
        (cluster, -1, cluster),
        (mlflow, 5000, cluster),
        (database, 5432, mlflow),
    }


def test_ssh_from_everywhere_cannot_be_chosen() -> None:
    pattern = re.search(r'AllowedPattern: "(.*)"', TEMPLATE.read_text())
    assert pattern is not None
    matches = re.compile(pattern[1].replace("\\\\", "\\")).match
    assert matches("203.0.113.7/32")
    assert not matches("0.0.0.0/0")


def test_the_database_is_encrypted_and_not_public(stack: Stack) -> None:
    (database,) = stack.client("rds").describe_db_instances()["DBInstances"]
    assert database["Engine"] == "postgres"
    assert database["StorageEncrypted"] and not database["PubliclyAccessible"]


@pytest.fixture(scope="module")
def boot(stack: Stack) -> str:
    """The boot script of the MLflow server's instance."""
    which = {"InstanceId": stack.resources["MlflowServer"], "Attribute": "userData"}
    attribute = stack.client("ec2").describe_instance_attribute(**which)
    return base64.b64decode(attribute["UserData"]["Value"]).decode()


def test_mlflow_starts_as_in_infra_mlflow_serve(stack: Stack, boot: str) -> None:
    """The instance has the script's settings and command, and no password."""
    serve = (processes.REPO / "infra/mlflow/serve").read_text()
    for setting in ("MLFLOW_BACKEND_STORE_URI=postgresql+psycopg://", "mlflow server --app-name basic-auth"):
        assert setting in serve
        assert setting in boot
    for line in (processes.REPO / "infra/mlflow/auth.ini").read_text().splitlines():
        assert line.startswith(";") or line in boot
    assert f"MLFLOW_ARTIFACTS_DESTINATION=s3://{stack.bucket}/mlflow" in boot
    for password in re.findall(r"\b\w*(?:PASSWORD|SECRET_KEY)=.*", boot):
        assert "=$(secret ddpm/mlflow-" in password


@pytest.mark.slow
def test_the_boot_script_creates_the_trainer_user(
    boot: str, guarded_mlflow: GuardedMlflowServer, tmp_path: Path
) -> None:
    """As on the instance, except for the port, the user's name, and the program that returns passwords."""
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
    assert guarded_mlflow.status("booted", "a-password-of-aws") == 200
    assert guarded_mlflow.status("booted", "another-password") == 401


@pytest.mark.parametrize("role", ["WorkerRole", "HeadRole"])
def test_roles_allow_what_jobs_need(role: str, policies: dict[str, list[str]], stack: Stack) -> None:
    bucket = f"arn:aws:s3:::{stack.bucket}"
    for action, prefix in itertools.product(OBJECTS, PREFIXES):
        assert allowed(policies[role], action, f"{bucket}/{prefix}/a/b"), (action, prefix)
    assert allowed(policies[role], "s3:ListBucket", bucket)  # head_bucket and every listing need it
    assert allowed(policies[role], "secretsmanager:GetSecretValue", secret("trainer"))


@pytest.mark.parametrize("role", ROLES)
def test_roles_allow_nothing_else(role: str, policies: dict[str, list[str]], stack: Stack) -> None:
    ours, another = f"arn:aws:s3:::{stack.bucket}", "arn:aws:s3:::another"
    buckets = [ours, f"{ours}/data/a", another, f"{another}/data/a"]
    prefixes = PREFIXES if role == "MlflowRole" else ("mlflow",)
    objects = [f"{another}/data/a", f"{ours}/elsewhere/a", *(f"{ours}/{prefix}/a" for prefix in prefixes)]
    secrets = () if role == "MlflowRole" else ("admin", "database", "forms")
    calls = [
        *itertools.product(NEVER, ["*", *buckets, *stack.outputs.values()]),
        *itertools.product(OBJECTS, objects),
        *(("secretsmanager:GetSecretValue", secret(name)) for name in secrets),
    ]
    assert [call for call in calls if allowed(policies[role], *call)] == []


def test_only_the_head_may_start_and_terminate_workers(policies: dict[str, list[str]], stack: Stack) -> None:
    account = stack.client("sts").get_caller_identity()["Account"]
    here = f"arn:aws:ec2:us-east-1:{account}"
    workers, mlflows = stack.role("WorkerRole")["Arn"], stack.role("MlflowRole")["Arn"]
    to_ec2, to_lambda = ({"iam_PassedToService": f"{name}.amazonaws.com"} for name in ("ec2", "lambda"))
    calls: dict[bool, list[tuple[str, str, dict[str, str]]]] = {
        True: [
            ("ec2:DescribeInstances", "*", {}),
            ("ec2:RunInstances", f"{here}:instance/*", {}),
            ("ec2:RunInstances", f"{here}:security-group/{stack.resources['ClusterSecurityGroup']}", {}),
            ("ssm:GetParameters", "arn:aws:ssm:us-east-1::parameter/aws/service/deeplearning/ami", {}),
            ("ec2:CreateTags", f"{here}:instance/i-new", {"ec2_CreateAction": "RunInstances"}),
            ("ec2:CreateTags", f"{here}:instance/i-1", {"aws_ResourceTag__ray-node-type": "worker"}),
            ("ec2:TerminateInstances", f"{here}:instance/i-1", {"aws_ResourceTag__ray-node-type": "worker"}),
            ("iam:PassRole", workers, to_ec2),
        ],
        False: [
            ("ec2:RunInstances", f"{here}:security-group/sg-of-others", {}),
            ("ssm:GetParameters", f"arn:aws:ssm:us-east-1:{account}:parameter/password", {}),
            ("ec2:TerminateInstances", f"{here}:instance/i-of-others", {}),
            ("ec2:CreateTags", f"{here}:instance/i-of-others", {}),
            ("iam:PassRole", workers, to_lambda),
            ("iam:PassRole", mlflows, to_ec2),
        ],
    }
    for to_head, (action, resource, context) in ((may, call) for may in calls for call in calls[may]):
        assert allowed(policies["HeadRole"], action, resource, **context) == to_head, (action, resource)
        for role in ("WorkerRole", "MlflowRole"):
            assert not allowed(policies[role], action, resource, **context), (role, action, resource)


def test_a_spot_machine_sees_the_notice_of_its_end(aws: AwsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cloud(aws, LOOPBACK, ("key", "secret")) as cloud:
        monkeypatch.setattr(notice, "METADATA", cloud.uri)
        assert notice.seconds_left() is None
        cloud.taken_back.add(LOOPBACK)
        left = notice.seconds_left()
        assert left is not None and 10 < left <= 120
    assert notice.seconds_left() is None  # no metadata service


def test_permissions_of_a_worker_on_the_real_bucket(aws: AwsServer, stack: Stack) -> None:
    """With credentials of the role, on a server that now enforces IAM."""
    arn = stack.role("WorkerRole")["Arn"]
    keys = stack.client("sts").assume_role(RoleArn=arn, RoleSessionName="worker")["Credentials"]
    _, options = aws_client(aws.endpoint, keys["AccessKeyId"], keys["SecretAccessKey"])
    file = {"Bucket": stack.bucket, "Key": "runs/a/state.json"}
    aws.check_permissions(True)
    try:
        worker = boto3.client("s3", **options, aws_session_token=keys["SessionToken"])
        worker.put_object(**file, Body=b"{}")
        assert worker.get_object(**file)["Body"].read() == b"{}"
        assert worker.list_objects_v2(Bucket=stack.bucket, Prefix="runs/")["KeyCount"] == 1
        worker.delete_object(**file)
        with pytest.raises(ClientError, match="AccessDenied"):
            worker.put_object(Bucket=stack.bucket, Key="mlflow/a", Body=b"")
        with pytest.raises(ClientError, match="AccessDenied"):
            worker.delete_bucket(Bucket=stack.bucket)
    finally:
        aws.check_permissions(False)


@pytest.fixture(scope="module")
def env(aws: AwsServer) -> Iterator[dict[str, str]]:
    """Environment of a machine: AWS, its metadata service, and a secret `ddpm/one` in the machine's region."""
    with Cloud(aws, LOOPBACK, ("machine", "key")) as cloud:
        aws.client("secretsmanager").create_secret(Name="ddpm/one", SecretString="of-a-machine")
        yield {
            "AWS_ENDPOINT_URL_SECRETS_MANAGER": cloud.uri,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": cloud.uri,
            "AWS_METADATA_SERVICE_TIMEOUT": "60",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }


def with_password(env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    script = processes.REPO / "infra/aws/with_password.py"
    return processes.run([sys.executable, script, *command], cwd=processes.REPO, env=env)


@pytest.mark.parametrize(
    ("secret", "done", "error"),
    [
        ("ddpm/one", (0, "of-a-machine\n"), ""),
        (
            "ddpm/another",
            (1, ""),
            "DDPM_MLFLOW_SECRET is 'ddpm/another', which cannot be read: .*NotFound.*\n",
        ),
    ],
)
def test_the_command_gets_the_password_or_does_not_run(
    env: dict[str, str], secret: str, done: tuple[int, str], error: str
) -> None:
    ran = with_password(env | {"DDPM_MLFLOW_SECRET": secret}, *ASK)
    assert (ran.returncode, ran.stdout) == done
    assert re.fullmatch(error, ran.stderr), ran.stderr


def test_without_a_secret_name_the_command_just_runs(env: dict[str, str]) -> None:
    done = with_password({name: "http://127.0.0.1:1" for name in env}, *ASK)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
    assert with_password(env, sys.executable, "-c", "raise SystemExit(7)").returncode == 7
    assert with_password(env).returncode == 2
