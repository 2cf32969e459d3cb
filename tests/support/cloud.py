"""The parts of AWS that launching a cluster needs: moto's EC2 and IAM, and an instance metadata service.

moto starts no machines, never runs out of capacity, and has no metadata service that requires tokens. A front end
before it refuses spot instances of the types in `no_spot`, gives each instance a host's address, records what was
requested, and serves credentials.
"""

import json
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import requests

from support.front_end import Answer, FrontEnd
from support.processes import REPO, program
from support.servers import LOOPBACK, Server, aws_client, free_ports

REGION = "us-east-1"
TEMPLATE = REPO / "infra/aws/stack.yaml"
OUT_OF_STOCK = """<?xml version="1.0" encoding="UTF-8"?>
<Response><Errors><Error><Code>InsufficientInstanceCapacity</Code><Message>We currently have no {} capacity</Message>
</Error></Errors><RequestID>test</RequestID></Response>"""


class AwsServer(Server):
    """moto's server: EC2, IAM, CloudFormation; its S3 checks no signatures."""

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.endpoint = f"http://{LOOPBACK}:{port}"
        command = [program("moto_server"), "--host", LOOPBACK, "--port", str(port)]
        super().__init__("moto", command, f"{self.endpoint}/moto-api/data.json", folder)

    def client(self, service: str) -> Any:
        """A client with the permissions of the account's owner."""
        return boto3.client(service, **aws_client(self.endpoint, "owner", "owner")[1])

    def reset(self) -> None:
        """Remove everything."""
        requests.post(f"{self.endpoint}/moto-api/reset", timeout=120).raise_for_status()

    def check_permissions(self, checked: bool) -> None:
        """Turn IAM authorization of all later calls on or off."""
        url = f"{self.endpoint}/moto-api/reset-auth"
        kind = {"Content-Type": "text/plain"}
        requests.post(url, b"0" if checked else b"inf", headers=kind, timeout=120).raise_for_status()


@dataclass(frozen=True)
class Launch:
    """The parameters of one RunInstances request."""

    instance_type: str
    spot: bool


class Cloud(FrontEnd):
    """A front end of moto's server.

    Args:
        moto: the server behind it.
        host: the address to listen on.
        keys: (access key, secret key) that the metadata service gives to an instance.
        addresses: of the hosts that play the instances, in the order of launching; then there is no capacity left.
        no_spot: prefixes of the instance types that have no spot capacity.
    """

    def __init__(
        self,
        moto: AwsServer,
        host: str,
        keys: tuple[str, str],
        addresses: Iterable[str] = (),
        no_spot: tuple[str, ...] = (),
    ) -> None:
        super().__init__(moto.endpoint, host)
        self.client = moto.client
        self.keys = keys
        self.no_spot = no_spot
        self._addresses = iter(addresses)
        self.launches: list[Launch] = []
        """All RunInstances requests in order, including refused ones."""
        self.taken_back = set[str]()
        """Addresses of the instances to which the metadata service announces their end."""

    def machines(self) -> list[dict[str, Any]]:
        """All instances of Ray clusters, terminated ones included, as DescribeInstances returns them."""
        ours = [{"Name": "tag-key", "Values": ["ray-cluster-name"]}]
        reservations = self.client("ec2").describe_instances(Filters=ours)["Reservations"]
        return [instance for reservation in reservations for instance in reservation["Instances"]]

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        if path.startswith("/latest/"):
            return self._metadata(method, path, headers)
        asked = urllib.parse.parse_qs(body.decode(errors="replace"))
        if asked.get("Action") == ["RunInstances"]:
            spot = asked.get("InstanceMarketOptions.MarketType") == ["spot"]
            launch = Launch(asked["InstanceType"][0], spot)
            self.launches.append(launch)
            refused = spot and launch.instance_type.startswith(self.no_spot)
            address = None if refused else next(self._addresses, None)
            if address is None:
                return 500, OUT_OF_STOCK.format(launch.instance_type).encode(), {"Content-Type": "text/xml"}
            body += f"&PrivateIpAddress={address}".encode()
            return self.forwarded(method, path, headers | {"content-length": str(len(body))}, body)
        return None

    def _metadata(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """The metadata service, version 2 only, as with HttpTokens: required."""
        plain = {"Content-Type": "text/plain"}
        if (method, path) == ("PUT", "/latest/api/token"):
            return 200, b"a-token", plain | {"x-aws-ec2-metadata-token-ttl-seconds": "21600"}
        if headers.get("x-aws-ec2-metadata-token") != "a-token":
            return 401, b"", plain
        parts = (
            path.removeprefix("/latest/meta-data/").rstrip("/").split("/")
        )  # Ray's client omits the last "/"
        match parts:
            case ["placement", "availability-zone"]:
                return 200, f"{REGION}a".encode(), plain
            case ["spot", "instance-action"] if headers["x-forwarded-for"] in self.taken_back:
                end = f"{datetime.now(UTC) + timedelta(seconds=120):%FT%TZ}"
                return 200, json.dumps({"action": "terminate", "time": end}).encode(), plain
            case ["iam", "security-credentials"]:
                return 200, b"a-role", plain
            case ["iam", "security-credentials", "a-role"]:
                access, secret = self.keys
                keys = {"AccessKeyId": access, "SecretAccessKey": secret, "Token": ""}
                keys |= {"LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "2100-01-01T00:00:00Z"}
                answer = json.dumps({"Code": "Success", "Type": "AWS-HMAC", **keys})
                return 200, answer.encode(), {"Content-Type": "application/json"}
        return 404, b"", plain


def make_stack(client: Callable[[str], Any], vpc: str) -> dict[str, str]:
    """Create the stack `ddpm` from infra/aws/stack.yaml in a VPC; returns its outputs.

    Args:
        client: returns a client of a service, with the account owner's permissions.
    """
    given = {"Vpc": vpc, "SshFrom": "203.0.113.7/32"}
    cloudformation = client("cloudformation")
    cloudformation.create_stack(
        StackName="ddpm",
        TemplateBody=TEMPLATE.read_text(),
        Capabilities=["CAPABILITY_IAM"],
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
    )
    (stack,) = cloudformation.describe_stacks(StackName="ddpm")["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    return {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
