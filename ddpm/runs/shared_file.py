"""Small files that several processes write, on disk and on S3: compare and swap."""

import contextlib
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from ddpm.runs import s3
from ddpm.runs.storage import Location
from ddpm.utils import files
from ddpm.utils.files import MAX_BYTES


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
        self._client = s3.client()
        self._is_plain = False
        """Whether the server lacks conditional writes."""

    def read(self) -> Version | None:
        status, found = s3.ask(self._get)
        if status not in (s3.OK, s3.NOT_FOUND):
            raise OSError(f"S3 answered {status}")
        return found

    def replace(self, version: Version | None, data: bytes | None) -> bool:
        if data is None:
            if self.read() != version:
                return False
            status, _ = s3.ask(lambda: self._client.delete_object(**self._where))
            return status == s3.OK
        if self._is_plain:
            if self.read() != version:
                return False
            status, _ = s3.ask(lambda: self._client.put_object(**self._where, Body=data))
            return status == s3.OK
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version.tag}
        status, _ = s3.ask(lambda: self._client.put_object(**self._where, Body=data, **condition))
        if status == s3.NOT_IMPLEMENTED:
            self._is_plain = True
            return self.replace(version, data)
        return status == s3.OK

    def _get(self) -> Version:
        got = self._client.get_object(**self._where)
        files.check_length(got["ContentLength"], MAX_BYTES, "s3://{Bucket}/{Key}".format(**self._where))
        return Version(got["Body"].read(), got["ETag"])
