"""Files on a local disk that appear whole or not at all, also when the power fails.

What is written gets a temporary name of its own, which tells whose it is: writers do not disturb each other, and what
dead ones left can be swept.
"""

import contextlib
import errno
import os
import shutil
import time
import uuid
from pathlib import Path

from ddpm.utils import process

SUFFIX = ".tmp"
ABANDONED_S = 24 * 3600.0
"""Age of a temporary file whose writer cannot be asked after, since it is on another machine, when it is swept."""
NO_SUCH_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""Answers of file systems that cannot fsync a folder."""


def temporary(path: Path) -> Path:
    """A name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{process.token()}.{uuid.uuid4().hex[:8]}{SUFFIX}")


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file under a temporary name, and rename it.

    Args:
        durable: return when it is on disk; else a power cut may take it away, or leave it empty.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    make_folder(path.parent)
    staged = temporary(path)
    try:
        staged.write_bytes(data)
        if durable:
            sync(staged)
        staged.replace(path)
        if durable:
            sync(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def put_in_place(folder: Path, place: Path) -> None:
    """Name `folder`, which `sync_tree` has put on disk, `place`; another folder there is removed first."""
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)
    sync(place.parent)


def make_folder(folder: Path) -> None:
    """Make `folder`, and those above it that are missing, on disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Return when the file at `path`, or the names in the folder at `path`, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SUCH_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Return when `folder` and everything in it is on disk; the name of `folder` itself may not be."""
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(where, name))
        sync(Path(where))


def sweep(folder: Path) -> None:
    """Remove what writers that are dead left in `folder`."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            if path.name.startswith(".") and path.name.endswith(SUFFIX) and _is_abandoned(path):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    *_, writer, _, _ = [""] * 3 + path.name.split(".")
    match process.state(writer):
        case "gone":
            return True
        case "running":
            return False
        case _:
            with contextlib.suppress(FileNotFoundError):
                return time.time() - path.stat().st_mtime > ABANDONED_S
            return False
