"""Small files that several processes write, on disk and on S3: compare and swap."""

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


def shared_file(file: Location, *, durable: bool = False) -> "_FileOnDisk | _FileOnS3":
    """A small file that several processes write: each replaces only what it has read.

    `read()` returns the current version; None: there is no file. `replace(version, data)` writes `data` (None: removes
    the file) if the current version is `version`, and returns whether it was. Both raise OSError when storage does not
    answer. When two processes replace the same version, only one gets True: a lock of the folder ensures this on disk,
    conditional writes on S3. On a network file system without locks, and on an S3 server without conditional writes,
    both may get True: read again to see which wrote last. `is_exclusive()` tells, of a file that exists.

    Args:
        durable: `replace` returns when the file is on disk, which takes longer; S3 is always durable.
    """
    if file.server is None:
        return _FileOnDisk(Path(file.path), durable)
    return _FileOnS3(file.server, file.path)


class _FileOnDisk:
    def __init__(self, path: Path, durable: bool) -> None:
        self._path = path
        self._durable = durable
        self._has_locks = True

    def read(self) -> Version | None:
        try:
            return Version(files.read_whole(self._path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def replace(self, version: Version | None, data: bytes | None) -> bool:
        files.make_folder(self._path.parent)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
            except OSError:  # a network file system
                self._has_locks = False
            if self.read() != version:
                return False
            if data is None:
                self._path.unlink(missing_ok=True)
            else:
                files.write_whole(self._path, data, durable=self._durable)
            return True
        finally:
            os.close(folder)

    def is_exclusive(self) -> bool:
        return self._has_locks


class _FileOnS3:
    def __init__(self, server: s3.Server, path: str) -> None:
        self._server = server
        self._path = path
        self._is_plain = False
        """Whether the server refuses conditional writes."""

    def read(self) -> Version | None:
        try:
            return Version(*s3.get(self._server, self._path, MAX_BYTES))
        except FileNotFoundError:
            return None

    def replace(self, version: Version | None, data: bytes | None) -> bool:
        if data is None:
            if self.read() != version:
                return False
            client = s3.client(self._server)
            status, _ = s3.ask(lambda: client.delete_object(**s3.at(self._path)))
            return status == s3.OK
        if self._is_plain:
            return self.read() == version and s3.put(self._server, self._path, data) == s3.OK
        if version is None:
            status = s3.put(self._server, self._path, data, IfNoneMatch="*")
        else:
            status = s3.put(self._server, self._path, data, IfMatch=version.tag)
        if status == s3.NOT_IMPLEMENTED:
            self._is_plain = True
            return self.replace(version, data)
        return status == s3.OK

    def is_exclusive(self) -> bool:
        if self._is_plain:
            return False
        now = self.read()
        # Some servers accept conditions and ignore them: a write that must be refused is not.
        return now is None or s3.put(self._server, self._path, now.data, IfNoneMatch="*") != s3.OK
