"""The frame of every job around its one library call: a user's mistake is one line, never a traceback."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ddpm import config as configs
from ddpm import presets
from ddpm.config import Config
from ddpm.utils.errors import UserError
from ddpm.utils.openmp import bound_spinning
from ddpm.utils.progress import printable


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit: 0 (or what it returns) when done, 2 for a user's mistake, 130 for Ctrl-C.

    Output that cannot be written is dropped: a closed pipe or a full disk behind it does not end a job.
    """
    bound_spinning()
    sys.stdout, sys.stderr = _lossy(sys.stdout), _lossy(sys.stderr)
    try:
        code = main() or 0
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


class _LossyFile(io.FileIO):
    """A file that drops what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written  # None: it would have to wait


def _lossy(stream: TextIO | None) -> TextIO:
    """A stream like `stream`, on which writing never fails."""
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
        errors="backslashreplace",  # for characters that the terminal does not have
        line_buffering=stream.isatty() or stream is sys.stderr,
    )


def starting_points() -> dict[str, Config]:
    """The presets, each with the changes of the --config file, and with the net of --model.net.

    Other flags are applied after it; which flags there are depends on the net.

    Raises:
        UserError: the file cannot be read, or is no config, or there is no such net.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", nargs="?")
    parser.add_argument("--model.net", nargs="?", dest="net")
    typed, found = parser.parse_known_args()[0], presets.PRESETS
    if typed.config is not None:
        try:
            text = Path(typed.config).read_text()
        except (OSError, ValueError) as error:
            raise UserError(f"--config {typed.config} cannot be read: {error}") from None
        found = {name: configs.merged(preset, text, typed.config) for name, preset in found.items()}
    if typed.net is not None:
        found = {name: configs.override(preset, {"model.net": typed.net}) for name, preset in found.items()}
    return found
