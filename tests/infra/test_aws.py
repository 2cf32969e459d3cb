"""infra/aws on a server that emulates AWS: the stack, the permissions of its roles, and the notice to spot machines."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import boto3
import notice
import pytest
from botocore.exceptions import ClientError
from support import processes
from support.cloud import TEMPLATE, AwsServer, Cloud, make_stack
from support.permissions import allowed, policies_of
from support.servers import LOOPBACK, aws_client

ROLES = ("WorkerRole", "HeadRole")
OBJECTS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
NEVER = """s3:DeleteBucket s3:PutBucketPolicy s3:PutObjectAcl s3:PutLifecycleConfiguration iam:CreateUser
    iam:CreateAccessKey iam:PutRolePolicy iam:AttachRolePolicy sts:AssumeRole secretsmanager:GetSecretValue kms:Decrypt
    ec2:AuthorizeSecurityGroupIngress ec2:CreateKeyPair ec2:ModifyInstanceAttribute lambda:CreateFunction
    cloudformation:UpdateStack""".split()


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
    outputs = make_stack(aws.client, subnets[0]["VpcId"])
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


def test_the_template_passes_cfn_lint() -> None:
    done = processes.run([processes.program("cfn-lint"), TEMPLATE], cwd=processes.REPO)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_the_outputs_have_what_a_cluster_needs(stack: Stack) -> None:
    iam = stack.client("iam")
    outputs = stack.outputs
    resources = stack.resources
    for role in ("Head", "Worker"):
        profile = iam.get_instance_profile(InstanceProfileName=resources[f"{role}Profile"])["InstanceProfile"]
        assert profile["Arn"] == outputs[f"{role}InstanceProfileArn"]
        assert [r["RoleName"] for r in profile["Roles"]] == [resources[f"{role}Role"]]
    assert outputs["SecurityGroupId"] == resources["ClusterSecurityGroup"]


def test_no_port_is_open_to_the_internet(stack: Stack) -> None:
    cluster = stack.resources["ClusterSecurityGroup"]
    (group,) = stack.client("ec2").describe_security_groups(GroupIds=[cluster])["SecurityGroups"]
    open_ports = set()
    for rule in group["IpPermissions"]:
        addresses = rule["IpRanges"] + rule.get("Ipv6Ranges", [])
        sources = [pair["GroupId"] for pair in rule["UserIdGroupPairs"]]
        for source in sources + [address["CidrIp"] for address in addresses]:
            open_ports.add((rule.get("FromPort", -1), source))
    assert open_ports == {(22, "203.0.113.7/32"), (-1, cluster)}


def test_ssh_from_everywhere_cannot_be_chosen() -> None:
    pattern = re.search(r'AllowedPattern: "(.*)"', TEMPLATE.read_text())
    assert pattern is not None
    matches = re.compile(pattern[1].replace("\\\\", "\\")).match
    assert matches("203.0.113.7/32")
    assert not matches("0.0.0.0/0")


@pytest.mark.parametrize("role", ROLES)
def test_roles_allow_what_jobs_need_and_nothing_else(
    role: str, policies: dict[str, list[str]], stack: Stack
) -> None:
    ours = f"arn:aws:s3:::{stack.bucket}"
    another = "arn:aws:s3:::another"
    assert allowed(policies[role], "s3:ListBucket", ours)  # head_bucket and every listing need it
    for action in OBJECTS:
        assert allowed(policies[role], action, f"{ours}/runs/a/b"), action
    resources = ["*", ours, f"{ours}/data/a", another, f"{another}/data/a", *stack.outputs.values()]
    calls = [*itertools.product(NEVER, resources), *itertools.product(OBJECTS, [f"{another}/data/a"])]
    assert [call for call in calls if allowed(policies[role], *call)] == []


def test_only_the_head_may_start_and_terminate_workers(policies: dict[str, list[str]], stack: Stack) -> None:
    account = stack.client("sts").get_caller_identity()["Account"]
    here = f"arn:aws:ec2:us-east-1:{account}"
    workers = stack.role("WorkerRole")["Arn"]
    heads = stack.role("HeadRole")["Arn"]
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
            ("iam:PassRole", heads, to_ec2),
        ],
    }
    for to_head, (action, resource, context) in ((may, call) for may in calls for call in calls[may]):
        assert allowed(policies["HeadRole"], action, resource, **context) == to_head, (action, resource)
        assert not allowed(policies["WorkerRole"], action, resource, **context), (action, resource)


def test_a_spot_machine_sees_the_notice_of_its_end(aws: AwsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cloud(aws, LOOPBACK, ("key", "secret")) as cloud:
        monkeypatch.setattr(notice, "METADATA", cloud.uri)
        assert notice.seconds_left() is None
        cloud.taken_back.add(LOOPBACK)
        left = notice.seconds_left()
        assert left is not None and 10 < left <= 120
    assert notice.seconds_left() is None  # no metadata service


def test_permissions_of_a_worker_on_the_real_bucket(aws: AwsServer, stack: Stack) -> None:
    """With credentials of the role, on a server that now enforces IAM.

    Nothing is listed: moto 5.2.6 asks for s3:ListObjectsV2, which is no permission of IAM. The test above covers
    s3:ListBucket.
    """
    arn = stack.role("WorkerRole")["Arn"]
    keys = stack.client("sts").assume_role(RoleArn=arn, RoleSessionName="worker")["Credentials"]
    _, options = aws_client(aws.endpoint, keys["AccessKeyId"], keys["SecretAccessKey"])
    file = {"Bucket": stack.bucket, "Key": "runs/a/state.json"}
    aws.check_permissions(True)
    try:
        worker = boto3.client("s3", **options, aws_session_token=keys["SessionToken"])
        worker.put_object(**file, Body=b"{}")
        assert worker.get_object(**file)["Body"].read() == b"{}"
        worker.delete_object(**file)
        with pytest.raises(ClientError, match="AccessDenied"):
            worker.delete_bucket(Bucket=stack.bucket)
    finally:
        aws.check_permissions(False)
