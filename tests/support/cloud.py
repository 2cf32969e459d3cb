"""The parts of AWS that launching a cluster needs: moto's EC2 and IAM, and an instance metadata service.

moto starts no machines, never runs out of capacity, and has no metadata service that requires tokens. A front end
before it refuses spot instances of the types in `no_spot`, records what was requested, and serves credentials.
"""

import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.processes import REPO, program
from support.servers import LOOPBACK, Server, free_ports

REGION = "us-east-1"
TEMPLATE = REPO / "infra/aws/stack.yaml"
OUT_OF_STOCK = """<?xml version="1.0" encoding="UTF-8"?>
<Response><Errors><Error><Code>InsufficientInstanceCapacity</Code><Message>We currently have no {} capacity</Message>
</Error></Errors><RequestID>test</RequestID></Response>"""
METADATA_TOKEN = "x-aws-ec2-metadata-token"


class AwsServer(Server):
    """moto's server: EC2, IAM, CloudFormation; its S3 checks no signatures. `client_env` is what clients need."""

    def __init__(self, folder: Path, host: str = LOOPBACK) -> None:
        (port,) = free_ports(1)
        self.endpoint = f"http://{host}:{port}"
        self.client_env = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "lab",
            "AWS_SECRET_ACCESS_KEY": "labsecret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.client_options = {
            "endpoint_url": self.endpoint,
            "aws_access_key_id": "lab",
            "aws_secret_access_key": "labsecret",
            "region_name": "us-east-1",
        }
        command = [program("moto_server"), "--host", host, "--port", str(port)]
        super().__init__("moto", command, f"{self.endpoint}/moto-api/data.json", folder)

    def check_permissions(self, checked: bool) -> None:
        """Turn IAM authorization of all later calls on or off."""
        request = urllib.request.Request(
            f"{self.endpoint}/moto-api/reset-auth",
            data=b"0" if checked else b"inf",
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request, timeout=10).close()


@dataclass(frozen=True)
class Launch:
    """The parameters of one RunInstances request."""

    instance_type: str
    spot: bool


class Cloud:
    """A moto server behind the front end; a context manager.

    Args:
        folder: where moto's log is written.
        host: the address they listen on.
        keys: (access key, secret key) that the metadata service gives to an instance.
        no_spot: prefixes of the instance types that have no spot capacity.
    """

    def __init__(self, folder: Path, host: str, keys: tuple[str, str], no_spot: tuple[str, ...] = ()) -> None:
        self._moto = AwsServer(folder, host)
        self._front = ThreadingHTTPServer((host, 0), _handler(self))
        self.endpoint = f"http://{host}:{self._front.server_port}"
        self.keys, self.no_spot = keys, no_spot
        self.launches: list[Launch] = []
        """All RunInstances requests in order, including refused ones."""

    def __enter__(self) -> Self:
        self._moto.start()
        threading.Thread(target=self._front.serve_forever, name="cloud", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._front.shutdown()
        self._front.server_close()
        self._moto.stop()

    def client(self, service: str) -> Any:
        import boto3

        keys = {"aws_access_key_id": "owner", "aws_secret_access_key": "owner"}
        return boto3.client(service, region_name=REGION, endpoint_url=self.endpoint, **keys)

    def machines(self) -> list[dict[str, Any]]:
        """All instances of Ray clusters, terminated ones included, as DescribeInstances returns them."""
        ours = [{"Name": "tag-key", "Values": ["ray-cluster-name"]}]
        reservations = self.client("ec2").describe_instances(Filters=ours)["Reservations"]
        return [instance for reservation in reservations for instance in reservation["Instances"]]

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes, str]:
        """Answer a request; returns (status, body, content type)."""
        if path.startswith("/latest/"):
            return self._metadata(method, path, headers)
        asked = urllib.parse.parse_qs(body.decode(errors="replace"))
        if asked.get("Action") == ["RunInstances"]:
            spot = asked.get("InstanceMarketOptions.MarketType") == ["spot"]
            launch = Launch(asked["InstanceType"][0], spot)
            self.launches.append(launch)
            if spot and launch.instance_type.startswith(self.no_spot):
                return 500, OUT_OF_STOCK.format(launch.instance_type).encode(), "text/xml"
        kept = {name: value for name, value in headers.items() if name != "content-length"}
        request = urllib.request.Request(self._moto.endpoint + path, body or None, kept, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read(), reply.headers.get("Content-Type", "text/xml")
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers.get("Content-Type", "text/xml")

    def _metadata(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes, str]:
        """The metadata service, version 2 only, as with HttpTokens: required."""
        if (method, path) == ("PUT", "/latest/api/token"):
            return 200, b"a-token", "text/plain"
        if headers.get(METADATA_TOKEN) != "a-token":
            return 401, b"", "text/plain"
        match (
            path.removeprefix("/latest/meta-data/").rstrip("/").split("/")
        ):  # Ray's C++ client leaves out the trailing slash
            case ["placement", "availability-zone"]:
                return 200, f"{REGION}a".encode(), "text/plain"
            case ["iam", "security-credentials"]:
                return 200, b"a-role", "text/plain"
            case ["iam", "security-credentials", "a-role"]:
                access, secret = self.keys
                keys = {"AccessKeyId": access, "SecretAccessKey": secret, "Token": ""}
                keys |= {"LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "2100-01-01T00:00:00Z"}
                return (
                    200,
                    json.dumps({"Code": "Success", "Type": "AWS-HMAC", **keys}).encode(),
                    "application/json",
                )
        return 404, b"", "text/plain"


def make_stack(client: Callable[[str], Any], vpc: str, subnets: list[str]) -> dict[str, str]:
    """Create the stack `ddpm` from infra/aws/stack.yaml in a VPC; returns its outputs.

    Args:
        client: returns a client of a service, with the account owner's permissions.
    """
    given = {"Vpc": vpc, "Subnets": ",".join(subnets), "SshFrom": "203.0.113.7/32"}
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


def _handler(cloud: Cloud) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer, kind = cloud.answer(self.command, self.path, headers, body)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(answer)))
            if "api/token" in self.path:
                self.send_header("x-aws-ec2-metadata-token-ttl-seconds", "21600")
            self.end_headers()
            self.wfile.write(answer)

        def do_POST(self) -> None:
            self.do_GET()

        def do_PUT(self) -> None:
            self.do_GET()

        def log_message(self, *of_request: object) -> None:
            pass

    return Handler
