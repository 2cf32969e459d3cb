"""Files on a local disk that are complete or absent, also after a power cut.

A file is first written under a unique temporary name that identifies the writing process: writers do not disturb each
other, and leftovers of dead writers can be removed.
"""

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from ddpm.utils import process
from ddpm.utils.errors import UserError

MAX_BYTES = 64 << 20
"""Largest file that is read whole, unless its reader sets another limit."""
SUFFIX = ".tmp"
TEMPORARY = re.compile(rf".*\.(?P<writer>[^.]*)\.[^.]*{re.escape(SUFFIX)}", re.DOTALL)
"""The name of a temporary file, with the token of the process that writes it."""
ABANDONED_S = 24 * 3600.0
"""Age at which a temporary file is removed if its writer ran on another machine and cannot be checked."""
NO_SUCH_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""Error numbers of file systems that cannot fsync a folder."""
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Error numbers of file systems without hard links; of two processes that create a file there, both may succeed."""


def temporary(path: Path) -> Path:
    """A unique name beside `path`."""
    return path.with_name(f".{path.name}.{process.token()}.{uuid.uuid4().hex[:8]}{SUFFIX}")


def read_whole(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a file of at most `max_bytes` bytes.

    Raises:
        UserError: it is larger.
        OSError: it cannot be read.
    """
    check_length(path.stat().st_size, max_bytes, str(path))
    return path.read_bytes()


def check_length(num_bytes: int, max_bytes: int, where: str) -> None:
    """Raise UserError if a file is too large to be read whole."""
    if num_bytes > max_bytes:
        raise UserError(f"{where} is larger than {max_bytes:,} bytes, the most that is read")


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file under a temporary name, and rename it.

    Args:
        durable: return when the file is on disk; otherwise a power cut may remove or empty it.
    """
    with _staged(path, data, durable) as staged:
        staged.replace(path)
        if durable:
            sync(path.parent)


def create_whole(path: Path, data: bytes, *, durable: bool = True) -> bool:
    """`write_whole` of a file that does not exist yet; returns False, and changes nothing, if it does."""
    with _staged(path, data, durable) as staged:
        try:
            os.link(staged, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            if path.exists():
                return False
            staged.replace(path)
        if durable:
            sync(path.parent)
        return True


@contextlib.contextmanager
def _staged(path: Path, data: bytes, durable: bool) -> Iterator[Path]:
    """A context with `data` in a temporary file beside `path`, on disk if `durable`; the file is removed at its end."""
    make_folder(path.parent)
    staged = temporary(path)
    try:
        staged.write_bytes(data)
        if durable:
            sync(staged)
        yield staged
    finally:
        staged.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create `folder` and its missing parents on disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Flush the file at `path`, or the names in the folder at `path`, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SUCH_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush `folder` and everything in it to disk, except the name of `folder` itself."""
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(where, name))
        sync(Path(where))


def sweep(folder: Path) -> None:
    """Remove the temporary files of dead writers in `folder`."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            if path.name.startswith(".") and path.name.endswith(SUFFIX) and _is_abandoned(path):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    named = TEMPORARY.fullmatch(path.name)
    state = "unknown" if named is None else process.state(named["writer"])
    with contextlib.suppress(FileNotFoundError):
        return state == "gone" or (state == "unknown" and time.time() - path.stat().st_mtime > ABANDONED_S)
    return False
