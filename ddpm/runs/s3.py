"""Access to S3, with the credentials and `AWS_ENDPOINT_URL` of the environment: a laptop, a test server and an instance
role work alike.

pyarrow lists, writes, and reads what is read in ranges. boto3 does what pyarrow cannot: check that a bucket exists and
may be read, create or replace an object only if it is absent or has not changed (shared_file.py), and read an object in
one request. pyarrow asks for the size first, so an object that is replaced meanwhile would be cut off.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.retry import error_line

# An unanswered call fails after about 20 s, and `retry_io` retries it: pyarrow itself makes three tries, and ends each
# after this long without a connection or a byte. Fewer tries can be set, but a pickled filesystem, as workers get it,
# loses that setting (pyarrow 25).
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 7.0
OK = 200
NOT_FOUND = 404
CONFLICT = 409
PRECONDITION_FAILED = 412
NOT_IMPLEMENTED = 501
ANSWERS = (NOT_FOUND, CONFLICT, PRECONDITION_FAILED, NOT_IMPLEMENTED)
"""HTTP errors that describe a shared file, and are no failure of S3."""


@dataclass(frozen=True)
class Server:
    """Where S3 is; credentials are found by each process in its environment, its profile, or its instance role."""

    endpoint: str | None
    """URL; None: AWS."""
    region: str | None

    @classmethod
    def configured(cls) -> "Server":
        """The server that the environment names."""
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return cls(endpoint or None, region or None)


def filesystem(server: Server) -> pafs.S3FileSystem:
    """pyarrow's S3."""
    # An explicit endpoint: pyarrow reads AWS_ENDPOINT_URL itself only in its newer releases.
    options: dict = {"connect_timeout": CONNECT_TIMEOUT_S, "request_timeout": REQUEST_TIMEOUT_S}
    options["allow_delayed_open"] = True  # one request per small file, not three: all or nothing
    if server.endpoint:
        parts = urlsplit(server.endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    if server.region:
        options["region"] = server.region
    return pafs.S3FileSystem(**options)


@lru_cache(maxsize=8)
def client(server: Server) -> Any:
    """boto3's client, which threads may share; it keeps the credentials that the process had at the first call."""
    return _new_client(server)


def _new_client(server: Server) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=REQUEST_TIMEOUT_S,
        retries={"total_max_attempts": 3, "mode": "standard"},
    )
    region = server.region or "us-east-1"
    return boto3.client("s3", config=config, region_name=region, endpoint_url=server.endpoint)


def get(server: Server, path: str, max_bytes: int) -> tuple[bytes, str]:
    """Content and ETag of the object at bucket/key: one version of it, in one request.

    Raises:
        UserError: it has more than `max_bytes` bytes.
        FileNotFoundError: there is none.
        OSError: S3 does not answer, or with another error.
    """
    where = at(path)

    def request() -> tuple[bytes, str]:
        answer = client(server).get_object(**where)
        files.check_length(answer["ContentLength"], max_bytes, f"s3://{path}")
        return answer["Body"].read(), answer["ETag"]

    status, found = ask(request)
    if status == NOT_FOUND:
        raise FileNotFoundError(f"s3://{path} does not exist")
    if status != OK:
        raise OSError(f"S3 answered {status}")
    return found


def put(server: Server, path: str, data: bytes, **condition: str) -> int:
    """Write the object at bucket/key under `condition`; returns OK or one of ANSWERS."""
    status, _ = ask(lambda: client(server).put_object(**at(path), Body=data, **condition))
    return status


def at(path: str) -> dict[str, str]:
    """The object at bucket/key, as boto3 names it."""
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}


def ask(request: Callable[[], Any]) -> tuple[int, Any]:
    """Call `request`, a call of boto3; return the HTTP status (OK or one of ANSWERS) and the result.

    Raises:
        OSError: S3 does not answer, or with another error.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return OK, request()
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status in ANSWERS and error.response.get("Error", {}).get("Code") != "NoSuchBucket":
            return status, None
        raise OSError(str(error)) from None
    except BotoCoreError as error:
        raise OSError(str(error)) from None


def server_of(bucket: str, uri: str) -> Server:
    """The server of a bucket, with the bucket's region, which pyarrow does not look up.

    UserError unless the bucket exists and may be used.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    configured = Server.configured()
    try:
        region = _new_client(configured).head_bucket(Bucket=bucket).get("BucketRegion") or configured.region
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status == 404:
            raise UserError(f"{uri}: bucket {bucket!r} does not exist; create it, or name another") from None
        if status in (401, 403):
            raise UserError(
                f"{uri}: S3 refuses access to bucket {bucket!r} (HTTP {status}); check the credentials "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the instance role) and their rights"
            ) from None
        raise UserError(f"{uri}: S3 answered {status or error}") from None
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"{uri}: cannot reach S3: {error_line(error)}") from None
    return Server(configured.endpoint, region)
