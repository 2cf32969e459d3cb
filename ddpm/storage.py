"""Folders and buckets behind one handle: a URI becomes a pyarrow filesystem and a path.

S3 is reached with the environment's own credentials and `AWS_ENDPOINT_URL`, so a laptop, a test server and
an instance role all look the same. boto3 asks the one question that pyarrow answers badly: does the bucket
exist, and may we read it?
"""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow.fs as pafs

from ddpm.config import UserError

# So that a call that nothing answers fails after about 20 s, and `patiently` has the rest: pyarrow makes three tries
# of its own, and ends one after so long without a connection or a byte. It could be told to make fewer, but forgets
# that when it is pickled (pyarrow 25), which is how workers get it.
S3_CONNECT_TIMEOUT_S = 5.0
S3_REQUEST_TIMEOUT_S = 7.0


@dataclass(frozen=True)
class Location:
    """A folder somewhere: `filesystem` and `path` to work with, `uri` to show and to pass on."""

    uri: str
    filesystem: pafs.FileSystem
    path: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> "Location":
        """The folder or file `name` inside."""
        return Location(f"{self.uri.rstrip('/')}/{name}", self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def exists(self) -> bool:
        return self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound

    def folders(self) -> list[str]:
        """Names of the folders inside, sorted; none when this one does not exist, or is a file."""
        return self._names(pafs.FileType.Directory)

    def files(self) -> list[str]:
        """Names of the files inside, sorted; none when this one does not exist, or is a file."""
        return self._names(pafs.FileType.File)

    def read(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def write(self, data: bytes) -> None:
        """Write the file whole or not at all: a temporary name and a rename on disk, one put on S3."""
        if not self.is_local:
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(data)
            return
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def download(self, folder: Path) -> Path:
        """Copy this folder's files into the local `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(self.path, str(folder), source_filesystem=self.filesystem)
        return folder

    def sweep(self) -> None:
        """Remove what a `write` left in this folder when its process was killed."""
        for name in self.files():
            if name.startswith(".") and name.endswith(".tmp"):
                self.filesystem.delete_file(self.child(name).path)

    def delete(self) -> None:
        """Remove this folder and all in it, if it is there."""
        if self.exists():
            self.filesystem.delete_dir(self.path)

    def _names(self, kind: pafs.FileType) -> list[str]:
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        try:
            infos = self.filesystem.get_file_info(selector)
        except NotADirectoryError:  # S3 lists nothing there
            return []
        return sorted(info.base_name for info in infos if info.type == kind)


def absolute(uri: str) -> str:
    """`uri` with a local folder made absolute, so that it means the same in every process of this machine."""
    if uri.startswith("file://"):
        uri = unquote(urlsplit(uri).path)
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def resolve(uri: str, check: bool = True) -> Location:
    """Open a folder (created later, when something is written) or an s3://bucket/prefix.

    Args:
        uri: a local path, file:///path, or s3://bucket/prefix.
        check: ask S3 whether the bucket is there; leave it out where that was asked before.

    Raises:
        UserError: another scheme, no such bucket, or one that refuses us.
    """
    scheme = urlsplit(uri).scheme if "://" in uri else "file"
    if scheme == "s3":
        path = uri.partition("://")[2].rstrip("/")  # not urlsplit's: a key may hold ? and #
        bucket = path.partition("/")[0]
        if not bucket:
            raise UserError(f"{uri!r} names no bucket; expected s3://bucket/prefix")
        if check:
            _check_bucket(bucket, uri)
        return Location(f"s3://{path}", _s3(), path)
    if scheme != "file":
        raise UserError(f"{uri!r}: unknown scheme {scheme!r}; expected a folder or s3://bucket/prefix")
    path = absolute(uri)
    return Location(path, pafs.LocalFileSystem(), path)


def _s3() -> pafs.S3FileSystem:
    # An explicit endpoint: pyarrow reads AWS_ENDPOINT_URL itself only in its newer releases.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict = {"connect_timeout": S3_CONNECT_TIMEOUT_S, "request_timeout": S3_REQUEST_TIMEOUT_S}
    options["allow_delayed_open"] = True  # a small file is one request, that works or does not, not three
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["region"] = region
    return pafs.S3FileSystem(**options)


def _check_bucket(bucket: str, uri: str) -> None:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 3, "mode": "standard"})
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    try:
        boto3.client("s3", config=config, region_name=region).head_bucket(Bucket=bucket)
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status == 404:
            raise UserError(f"{uri}: bucket {bucket!r} does not exist; create it, or name another") from None
        if status in (401, 403):
            raise UserError(
                f"{uri}: S3 refuses access to bucket {bucket!r} (HTTP {status}); check the credentials "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the instance role) and their rights"
            ) from None
        if status == 301:  # it exists, in another region; pyarrow finds that region itself
            return
        raise UserError(f"{uri}: S3 answered {status or error}") from None
    except (BotoCoreError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{uri}: cannot reach S3: {reason}") from None
