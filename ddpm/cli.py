"""What every job does around its one library call: a user's mistake is one line, never a traceback."""

import sys
from collections.abc import Callable
from typing import NoReturn

from ddpm.config import UserError


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit: 0 (or what it returns) when done, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)
