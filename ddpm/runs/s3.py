"""Access to S3, with the credentials and `AWS_ENDPOINT_URL` of the environment: a laptop, a test server and an instance
role work alike.

pyarrow reads and writes. boto3 does what pyarrow does badly or cannot do: check that the bucket exists and may be read,
and replace an object only if it has not changed (shared_file.py).
"""

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

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


def filesystem(region: str | None) -> pafs.S3FileSystem:
    """pyarrow's S3 for buckets of a region; None: pyarrow's default."""
    # An explicit endpoint: pyarrow reads AWS_ENDPOINT_URL itself only in its newer releases.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict = {"connect_timeout": CONNECT_TIMEOUT_S, "request_timeout": REQUEST_TIMEOUT_S}
    options["allow_delayed_open"] = True  # one request per small file, not three: all or nothing
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    if region:
        options["region"] = region
    return pafs.S3FileSystem(**options)


def client() -> Any:
    """A client of boto3."""
    import boto3
    from botocore.config import Config

    config = Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 3, "mode": "standard"})
    return boto3.client("s3", config=config, region_name=_configured_region() or "us-east-1")


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


def region_of(bucket: str, uri: str) -> str | None:
    """The region of a bucket, which pyarrow does not look up; UserError unless the bucket exists and may be used."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return client().head_bucket(Bucket=bucket).get("BucketRegion") or _configured_region()
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


def _configured_region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
