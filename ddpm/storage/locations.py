"""Folders and buckets behind one handle: a URI becomes a pyarrow filesystem and a path.

S3 access uses the credentials and `AWS_ENDPOINT_URL` of the environment, so a laptop, a test server and an instance
role work alike. boto3 does what pyarrow does badly or cannot do: check that the bucket exists and may be read, and
replace an object only if it has not changed (`shared_file`).
"""

import contextlib
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow.fs as pafs

from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.files import MAX_BYTES
from ddpm.utils.retry import error_line

# An unanswered call fails after about 20 s, and `retry_io` retries it: pyarrow itself makes three tries, and ends each
# after this long without a connection or a byte. Fewer tries can be set, but a pickled filesystem, as workers get it,
# loses that setting (pyarrow 25).
S3_CONNECT_TIMEOUT_S = 5.0
S3_REQUEST_TIMEOUT_S = 7.0
OK = 200
NOT_FOUND = 404
CONFLICT = 409
PRECONDITION_FAILED = 412
NOT_IMPLEMENTED = 501
ANSWERS = (NOT_FOUND, CONFLICT, PRECONDITION_FAILED, NOT_IMPLEMENTED)
"""HTTP errors that tell the state of a shared file, not a failure of S3."""
HOME = "DDPM_HOME"
"""Variable of the environment: the folder that relative paths start from. Unset: the working folder."""


@dataclass(frozen=True)
class Location:
    """A local or S3 folder or file: `filesystem` and `path` for access, `uri` for display and other processes."""

    uri: str
    filesystem: pafs.FileSystem
    path: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> "Location":
        """The folder or file `name` inside."""
        return Location(f"{self.uri.rstrip('/')}/{name}", self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def beside(self, name: str) -> "Location":
        """The folder or file `name` in the same folder."""
        uri = self.uri.rpartition("/")[0]
        path = self.path.rpartition("/")[0]
        return Location(f"{uri}/{name}", self.filesystem, f"{path}/{name}")

    def exists(self) -> bool:
        return self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound

    def folders(self) -> list[str]:
        """Names of the folders inside, sorted; empty if this folder does not exist or is a file."""
        return self._names(pafs.FileType.Directory)

    def files(self) -> list[str]:
        """Names of the files inside, sorted; empty if this folder does not exist or is a file."""
        return self._names(pafs.FileType.File)

    def read(self, most: int = MAX_BYTES) -> bytes:
        """The content of this file; UserError if it has more than `most` bytes."""
        if self.is_local:
            return files.read_whole(Path(self.path), most)
        with self.filesystem.open_input_stream(self.path) as stream:
            data: bytes = stream.read(most + 1)
        files.check_length(len(data), most, self.uri)
        return data

    def write(self, data: bytes, *, durable: bool = False) -> None:
        """Write the file whole or not at all: by a temporary name and a rename on disk, by one put on S3.

        Args:
            durable: return when the file is on disk, which takes longer; a write to S3 is always durable.
        """
        if self.is_local:
            files.write_whole(Path(self.path), data, durable=durable)
            return
        with self.filesystem.open_output_stream(self.path) as stream:
            stream.write(data)

    def sweep(self) -> None:
        """Remove temporary files of killed writers in this folder; on S3 there are none."""
        if self.is_local:
            files.sweep(Path(self.path))

    def unlink(self) -> None:
        """Remove this file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path)

    def delete(self) -> None:
        """Remove this folder and all in it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.path)

    def delete_if_empty(self) -> None:
        """Remove this folder unless something is in it; a bucket has no empty folders."""
        if self.is_local:
            with contextlib.suppress(OSError):
                Path(self.path).rmdir()

    def _names(self, kind: pafs.FileType) -> list[str]:
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        try:
            infos = self.filesystem.get_file_info(selector)
        except NotADirectoryError:  # S3 lists nothing there
            return []
        return sorted(info.base_name for info in infos if info.type == kind)


@dataclass(frozen=True)
class Version:
    """Content of a shared file when it was read."""

    data: bytes
    tag: str = ""
    """S3's ETag."""


def shared_file(file: Location) -> "_FileOnDisk | _FileOnS3":
    """A small file that several processes write: each replaces only what it has read.

    `read()` returns the current version; None: there is no file. `replace(version, data)` writes `data` (None: removes
    the file) if the current version is `version`, and returns whether it was. Both raise OSError when storage does not
    answer. When two processes replace the same version, only one gets True: a lock of the folder ensures this on disk,
    conditional writes on S3. On a network file system without locks, and on an S3 server without conditional writes,
    both may get True: read again to see which wrote last.
    """
    return _FileOnDisk(Path(file.path)) if file.is_local else _FileOnS3(file.path)


class _FileOnDisk:
    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Version | None:
        try:
            return Version(files.read_whole(self._path))
        except FileNotFoundError:
            return None

    def replace(self, version: Version | None, data: bytes | None) -> bool:
        files.make_folder(self._path.parent)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a network file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            if self.read() != version:
                return False
            if data is None:
                self._path.unlink(missing_ok=True)
            else:
                files.write_whole(self._path, data, durable=False)
            return True
        finally:
            os.close(folder)


class _FileOnS3:
    def __init__(self, path: str) -> None:
        bucket, _, key = path.partition("/")
        self._where = {"Bucket": bucket, "Key": key}
        self._client = _s3_client()
        self._is_plain = False
        """Whether the server lacks conditional writes."""

    def read(self) -> Version | None:
        status, found = self._ask(self._get)
        if status not in (OK, NOT_FOUND):
            raise OSError(f"S3 answered {status}")
        return found

    def replace(self, version: Version | None, data: bytes | None) -> bool:
        if data is None or self._is_plain:
            if self.read() != version:
                return False
            action = self._client.delete_object if data is None else self._client.put_object
            body = {} if data is None else {"Body": data}
            return self._ask(lambda: action(**self._where, **body))[0] == OK
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version.tag}
        status, _ = self._ask(lambda: self._client.put_object(**self._where, Body=data, **condition))
        if status == NOT_IMPLEMENTED:
            self._is_plain = True
            return self.replace(version, data)
        return status == OK

    def _get(self) -> Version:
        got = self._client.get_object(**self._where)
        files.check_length(got["ContentLength"], MAX_BYTES, "s3://{Bucket}/{Key}".format(**self._where))
        return Version(got["Body"].read(), got["ETag"])

    @staticmethod
    def _ask(request: Callable[[], Any]) -> tuple[int, Any]:
        """Call `request`; return the HTTP status (OK or one of ANSWERS) and the result."""
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


def absolute(uri: str) -> str:
    """Make a local `uri` absolute, so that it names the same folder in every process of this machine.

    A relative one starts from HOME.
    """
    if uri.startswith("file://"):
        uri = unquote(urlsplit(uri).path)
    if "://" in uri:
        return uri
    try:
        return str(Path(os.environ.get(HOME, ""), Path(uri).expanduser()).absolute())
    except RuntimeError as error:  # ~name of no user
        raise UserError(f"{uri}: {error}") from None


def resolve(uri: str) -> Location:
    """Open a folder, file:///path, which a first write creates, or s3://bucket/prefix, whose bucket must exist."""
    if "\0" in uri:
        raise UserError(f"{uri!r} has a NUL character, which no folder or URI can have")
    scheme = urlsplit(uri).scheme if "://" in uri else "file"
    if scheme == "s3":
        path = uri.partition("://")[2].rstrip("/")  # without urlsplit: a key may hold ? and #
        bucket = path.partition("/")[0]
        if not bucket:
            raise UserError(f"{uri!r} names no bucket; expected s3://bucket/prefix")
        if "//" in path:
            raise UserError(f"{uri!r} has an empty part, //; expected s3://bucket/prefix")
        return Location(f"s3://{path}", _s3(_region_of(bucket, uri)), path)
    if scheme != "file":
        raise UserError(f"{uri!r}: unknown scheme {scheme!r}; expected a folder or s3://bucket/prefix")
    path = absolute(uri)
    return Location(path, pafs.LocalFileSystem(), path)


def _s3(region: str | None) -> pafs.S3FileSystem:
    # An explicit endpoint: pyarrow reads AWS_ENDPOINT_URL itself only in its newer releases.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict = {"connect_timeout": S3_CONNECT_TIMEOUT_S, "request_timeout": S3_REQUEST_TIMEOUT_S}
    options["allow_delayed_open"] = True  # one request per small file, not three: all or nothing
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    if region:
        options["region"] = region
    return pafs.S3FileSystem(**options)


def _s3_client() -> Any:
    import boto3
    from botocore.config import Config

    config = Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 3, "mode": "standard"})
    return boto3.client("s3", config=config, region_name=_configured_region() or "us-east-1")


def _configured_region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def _region_of(bucket: str, uri: str) -> str | None:
    """The region of a bucket, which pyarrow does not look up; UserError unless the bucket exists and may be used."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return _s3_client().head_bucket(Bucket=bucket).get("BucketRegion") or _configured_region()
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
