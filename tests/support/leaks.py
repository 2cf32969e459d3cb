"""Search files, buckets, tables and command lines for leaked secrets."""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from support.guarded import PostgresServer

Texts = dict[str, bytes]
"""Where -> the content found there."""


def in_files(folder: Path) -> Texts:
    """The content of all regular files under a folder; symbolic links are skipped."""
    found = {}
    for where, _, names in os.walk(folder):  # os.walk skips folders that vanish meanwhile
        for path in (Path(where, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not path.is_symlink():
                    found[str(path)] = path.read_bytes()
    return found


def in_bucket(client: Any, bucket: str) -> Texts:
    """The content of all objects of a bucket."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return {f"s3://{bucket}/{key}": client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def in_tables(postgres: PostgresServer, database: str) -> Texts:
    """The content of all tables of a database."""
    tables = postgres.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", database)
    return {
        f"table {table}": repr(postgres.execute(f'SELECT * FROM "{table}"', database)).encode()
        for (table,) in tables
    }


@contextlib.contextmanager
def arguments(pids: Iterable[int], every_s: float = 0.1) -> Iterator[set[str]]:
    """Collect the command lines of all descendants of some processes while the context is open."""
    found, done, ancestors = set[str](), threading.Event(), [psutil.Process(pid) for pid in pids]

    def look() -> None:
        while not done.wait(every_s):
            for ancestor in ancestors:
                with contextlib.suppress(psutil.Error):
                    for process in ancestor.children(recursive=True):
                        with contextlib.suppress(psutil.Error):
                            found.add(" ".join(process.cmdline()))

    thread = threading.Thread(target=look, name="arguments", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def leaks(secrets: Mapping[str, str], texts: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """(name of the secret, where) for every secret that a text contains."""
    return [
        (name, where)
        for name, secret in secrets.items()
        for where in texts
        if secret.encode() in texts[where]
    ]
