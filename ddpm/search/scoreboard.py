"""The display of a search: one live table in a terminal, one line per event elsewhere."""

import sys
from collections.abc import Callable, Sequence
from typing import Self

from rich import box
from rich.live import Live
from rich.table import Table

from ddpm.search.event_log import Trial
from ddpm.search.trial_manager import changes_text

SHOWN = 30
"""Largest number of trials in the live table, which shows the newest."""


class Scoreboard:
    """A context that shows a search.

    Args:
        trials: returns the trials so far.
        num_trials: total number of trials.
    """

    def __init__(self, trials: Callable[[], Sequence[Trial]], num_trials: int) -> None:
        self._trials, self._num_trials = trials, num_trials
        self._live = Live(self._table(), auto_refresh=False) if sys.stdout.isatty() else None

    def news(self, line: str) -> None:
        """Show an event."""
        if self._live is None:
            print(line, flush=True)
        else:
            self._live.update(self._table(), refresh=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _table(self) -> Table:
        trials = self._trials()
        over = sum(trial.status != "running" for trial in trials)
        made = Table(title=f"{over} of {self._num_trials} trials", title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("trial", "", "images", "bits/dim", "changes"):
            made.add_column(name, justify="right" if name in ("images", "bits/dim") else "left")
        for trial in trials[-SHOWN:]:
            seen, bits = (f"{trial.images_seen:,}", trial.last.shown) if trial.last else ("", "")
            status = trial.status + (f": {trial.reason}" if trial.reason else "")
            made.add_row(trial.name, status, seen, bits, changes_text(trial.changes))
        return made
