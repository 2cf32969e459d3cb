"""Streams that a job can always write to."""

import io
import os
import sys
from typing import Any, TextIO


def lossy(stream: TextIO | None) -> TextIO:
    """Wrap `stream` so that writing never fails."""
    if stream is None:  # closed before the job started
        return open(os.devnull, "w")
    try:
        number = stream.fileno()
    except OSError:  # a stream in memory
        return stream
    stream.flush()
    file = io.BufferedWriter(_LossyFile(number, "wb", closefd=False))
    return io.TextIOWrapper(
        file,
        encoding=stream.encoding,
        errors="backslashreplace",  # for characters that the terminal cannot show
        line_buffering=stream.isatty() or stream is sys.stderr,
    )


class _LossyFile(io.FileIO):
    """A file that drops what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written  # None: the write would block
