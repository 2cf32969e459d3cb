"""Folders and buckets behind one handle: a URI becomes a pyarrow filesystem and a path.

Access to S3 is in s3.py; small files that several processes write are in shared_file.py.
"""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow.fs as pafs

from ddpm.runs import s3
from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.files import MAX_BYTES

HOME = "DDPM_HOME"
"""Variable of the environment: the folder that relative paths start from. Unset: the working folder."""


@dataclass(frozen=True)
class Location:
    """A local or S3 folder or file: `filesystem` and `path` for access, `uri` for display and other processes."""

    uri: str
    filesystem: pafs.FileSystem
    path: str
    server: s3.Server | None = None
    """Where S3 is; None: the location is on disk."""

    @property
    def is_local(self) -> bool:
        return self.server is None

    def child(self, name: str) -> "Location":
        """The folder or file `name` inside."""
        uri = f"{self.uri.rstrip('/')}/{name}"
        return replace(self, uri=uri, path=f"{self.path.rstrip('/')}/{name}")

    def beside(self, name: str) -> "Location":
        """The folder or file `name` in the same folder."""
        uri = self.uri.rpartition("/")[0]
        path = self.path.rpartition("/")[0]
        return replace(self, uri=f"{uri}/{name}", path=f"{path}/{name}")

    def exists(self) -> bool:
        return self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound

    def folders(self) -> list[str]:
        """Names of the folders inside, sorted; empty if this folder does not exist or is a file."""
        return self._names(pafs.FileType.Directory)

    def files(self) -> list[str]:
        """Names of the files inside, sorted; empty if this folder does not exist or is a file."""
        return self._names(pafs.FileType.File)

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """The content of this file, one version of it; UserError if it has more than `max_bytes` bytes."""
        if self.server is None:
            return files.read_whole(Path(self.path), max_bytes)
        data, _ = s3.get(self.server, self.path, max_bytes)
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

    def create(self, data: bytes, *, durable: bool = False) -> bool:
        """`write`, unless the file exists already; returns whether it exists with this content.

        Of several processes that create one file, one succeeds. On an S3 server without conditional writes, more may.
        """
        if self.server is None:
            created = files.create_whole(Path(self.path), data, durable=durable)
        else:
            status = s3.put(self.server, self.path, data, IfNoneMatch="*")
            if status == s3.NOT_IMPLEMENTED and not self.exists():
                status = s3.put(self.server, self.path, data)
            created = status == s3.OK
        if not created:  # or the answer of S3 was lost, and this is our own
            with contextlib.suppress(UserError):  # it is longer
                return self.read(max(len(data), 1)) == data
        return created

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
        server = s3.server_of(bucket, uri)
        return Location(f"s3://{path}", s3.filesystem(server), path, server)
    if scheme != "file":
        raise UserError(f"{uri!r}: unknown scheme {scheme!r}; expected a folder or s3://bucket/prefix")
    path = absolute(uri)
    return Location(path, pafs.LocalFileSystem(), path)
