"""A client of S3 for processes that are spawned.

A separate module because torch-fidelity 0.4 installs a package that is also called `tests`: a spawned process would
look for tests.test_proxy there.
"""

import boto3
from botocore.config import Config

DATA = bytes(range(256)) * 12_288


def client(endpoint: str, attempts: int = 1) -> boto3.client:
    retries = {"total_max_attempts": attempts, "mode": "standard"}
    return boto3.client("s3", endpoint_url=endpoint, config=Config(read_timeout=2, retries=retries))


def fetch(s3: boto3.client, bucket: str) -> bytes:
    body: bytes = s3.get_object(Bucket=bucket.removeprefix("s3://"), Key="x")["Body"].read()
    return body


def fetch_often(endpoint: str, bucket: str) -> bool:
    return all(fetch(client(endpoint), bucket) == DATA for _ in range(5))
