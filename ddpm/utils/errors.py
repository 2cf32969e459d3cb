"""The error that jobs print without a traceback."""


class UserError(Exception):
    """A user's mistake: one line that says what was wrong, where, and what would be right.

    Jobs print it without a traceback and exit with `exit_code`.
    """

    exit_code = 2
