"""What every job does around its one library call: a user's mistake is one line, never a traceback."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ddpm import config as configs
from ddpm import presets
from ddpm.config import Config, UserError
from ddpm.progress import printable


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit: 0 (or what it returns) when done, 2 for a user's mistake, 130 for Ctrl-C."""
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


def starting_points() -> dict[str, Config]:
    """The presets, each with what the file of --config changes in it; what else is typed comes after.

    Raises:
        UserError: the file cannot be read, or is no config.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", nargs="?")
    path = parser.parse_known_args()[0].config
    if path is None:
        return presets.PRESETS
    try:
        text = Path(path).read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from None
    return {name: configs.merged(preset, text, path) for name, preset in presets.PRESETS.items()}
