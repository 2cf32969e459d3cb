"""The digest that identifies the files of a source, and a cache that spares reading them each time.

The content counts, not the times: after a copy, an unzip or a checkout it is the same data set, after an image was
edited it is another one, even if the image's size in bytes is the same. The cache has, for each file of a folder, the
size and the times that it had when it was read, and its digest; a file with another size or time is read again.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.progress import track
from ddpm.utils.retry import as_user_error

CACHE = "DDPM_CACHE"
"""Variable of the environment: the folder of the cache. Unset: ~/.cache/ddpm-on-ray."""
MAX_CACHE_BYTES = 1 << 30
"""Enough for some six million files."""
READERS = 8
MANY_BYTES = 1 << 30
"""Reading more than this shows its progress."""
RECENT_NS = 2 * 10**9
"""A file that changed this recently is not in the cache: the next change could leave the same time."""
UNREADABLE = "unreadable"
"""The digest of a file that cannot be read; the error of reading its image gives the reason."""
State = tuple[int, int, int]
"""Size, and the times of the last change of the content and of the last change of anything, in nanoseconds. Programs
that edit an image can restore the first time, but not the second."""


def digest_of_files(folder: Path, paths: Iterable[Path]) -> str:
    """SHA-256 of the names of the files below `folder`, and of their contents.

    Raises:
        UserError: a file is not there.
    """
    began = time.time_ns()
    known = _read_cache(folder)
    states: dict[str, State] = {}
    digests: dict[str, str] = {}
    num_bytes = 0
    with as_user_error(f"cannot read {folder}"):  # for example, a file was removed after it was listed
        for path in paths:
            name = path.relative_to(folder).as_posix()
            status = path.stat()
            states[name] = status.st_size, status.st_mtime_ns, status.st_ctime_ns
            state, digest = known.get(name, (None, ""))
            if state == states[name]:
                digests[name] = digest
            else:
                num_bytes += status.st_size
        unknown = [name for name in states if name not in digests]
        with ThreadPoolExecutor(READERS, thread_name_prefix="ddpm-digest") as pool:
            read: Iterable[str] = pool.map(_digest, [folder / name for name in unknown])
            if num_bytes > MANY_BYTES:
                read = track("files read", len(unknown), read)
            digests |= zip(unknown, read, strict=True)
    settled = {
        name: (state, digests[name])
        for name, state in states.items()
        if digests[name] != UNREADABLE and max(state[1:]) < began - RECENT_NS
    }
    if settled != known:
        _write_cache(folder, settled)
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise
    except OSError:
        return UNREADABLE


def _read_cache(folder: Path) -> dict[str, tuple[State, str]]:
    """The state and digest of each file that was read before; nothing, if the cache is not there or damaged."""
    try:
        cached = json.loads(files.read_whole(_cache_of(folder), MAX_CACHE_BYTES))
        return {name: (tuple(state), digest) for name, (state, digest) in cached.items()}
    except (OSError, UserError, RuntimeError, ValueError, TypeError, AttributeError):
        return {}


def _write_cache(folder: Path, entries: dict[str, tuple[State, str]]) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # then all files are read again
        files.write_whole(_cache_of(folder), json.dumps(entries).encode(), durable=False)


def _cache_of(folder: Path) -> Path:
    """The file of the cache for a folder; RuntimeError: the user has no home."""
    top = os.environ.get(CACHE) or Path.home() / ".cache/ddpm-on-ray"
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return Path(top, f"{name}.json")
