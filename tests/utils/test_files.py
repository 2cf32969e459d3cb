"""Concurrent writers of a file do not disturb each other, and only files of dead writers are removed."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.processes import REPO

from ddpm.runs.storage import resolve
from ddpm.utils import files, process


@pytest.mark.parametrize(
    "write", [files.write_whole, lambda path, data: resolve(str(path)).write(data, durable=True)]
)
def test_writers_of_one_file_do_not_disturb_each_other(write: Any, tmp_path: Path) -> None:
    file = tmp_path / "a/b/file"
    seen = set[bytes]()
    contents = {bytes([i]) * 200_000 for i in range(3)}

    def write_often(data: bytes) -> None:
        for _ in range(50):
            write(file, data)
            seen.add(file.read_bytes())

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write_often, contents))
    assert seen <= contents and list(file.parent.iterdir()) == [file]


def test_only_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from ddpm.utils import files; print(files.temporary(pathlib.Path(sys.argv[1])))"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "x")]
    dead = Path(subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=True).stdout.strip())
    dead.mkdir()
    (dead / "inside").write_bytes(b"x")
    (tmp_path / f".x.y.{dead.name.split('.')[2]}.0.tmp").write_bytes(b"")
    mine = files.temporary(tmp_path / "x")
    elsewhere = tmp_path / ".x.a-1-1.b.tmp"
    old = tmp_path / ".x.12.tmp"
    kept = [mine, elsewhere, tmp_path / "x", tmp_path / ".hidden", tmp_path / "y.tmp"]
    for path in (*kept, old):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    files.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    files.sweep(tmp_path / "not-there")


def test_a_process_is_distinguished_from_another_with_the_same_pid() -> None:
    assert process.state(process.token()) == "running"
    assert process.state(process.token() + "0") == "gone"
    for other in ("", "x", "elsewhere-1-1", "unknown-1-1", "None"):
        assert process.state(other) == "unknown"
    assert files.temporary(Path("a/b")) != files.temporary(Path("a/b"))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        files.write_whole(tmp_path / "taken", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
