"""Simulated power cuts: what was not fsynced is lost. A small version of LazyFS's idea, which uses FUSE."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest


class Disk:
    """A context manager that tracks this process's writes below `root`, and what a power cut would leave of them.

    Args:
        root: an existing folder.
        moment: called after every fsync, rename and removal, each a moment when the power may fail.
    """

    def __init__(self, root: Path, moment: Callable[["Disk"], object]) -> None:
        self._root = root
        self._moment = moment
        self._patch = pytest.MonkeyPatch()
        self._content: dict[int, bytes] = {}
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        self._held: list[int] = []  # open files, so that no inode number is reused

    def __enter__(self) -> Self:
        self._note(self._root)
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.is_relative_to(self._root):
                self._note(path)
                self._moment(self)

        self._patch.setattr(os, "fsync", noted)
        for name in ("rename", "replace", "unlink"):
            self._patch.setattr(os, name, self._followed(getattr(os, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()
        for descriptor in self._held:
            os.close(descriptor)

    def after_power_cut(self, out: Path, *, names_survive: bool) -> Path:
        """Write to `out` what a power cut would leave now.

        Args:
            names_survive: file names survive without an fsync of their folder, as when the file system has just written
               them; file content still needs an fsync.
        """
        if names_survive:
            for path in self._root.rglob("*"):
                copy = out / path.relative_to(self._root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                if path.is_file():
                    copy.write_bytes(self._content.get(path.stat().st_ino, b""))
        else:
            self._write(self._root.stat().st_ino, out)
        return out

    def _write(self, folder: int, out: Path) -> None:
        out.mkdir()
        for name, (inode, is_folder) in self._names.get(folder, {}).items():
            if is_folder:
                self._write(inode, out / name)
            else:
                (out / name).write_bytes(self._content.get(inode, b""))

    def _note(self, path: Path) -> None:
        self._held.append(os.open(path, os.O_RDONLY))
        if path.is_dir():
            inside = {p.name: (p.stat().st_ino, p.is_dir()) for p in path.iterdir()}
            self._names[path.stat().st_ino] = inside
        else:
            self._content[path.stat().st_ino] = path.read_bytes()

    def _followed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def followed(*args: Any, **named: Any) -> None:
            call(*args, **named)
            self._moment(self)

        return followed
