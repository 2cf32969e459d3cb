"""The display of a search: one live table in a terminal; elsewhere a line per event, or per interval without."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from ddpm.search.trials import Trial, changes_text, shown
from ddpm.utils.progress import LINE_INTERVAL_S, LiveText
from ddpm.utils.tables import Table

SHOWN = 30
"""Largest number of trials in the live table, which shows the newest."""


class Scoreboard:
    """Shows a search: a live table in a terminal, else lines.

    Args:
        trials: returns the trials so far.
        num_trials: total number of trials, besides finalists that are trained again.
    """

    def __init__(self, trials: Callable[[], Sequence[Trial]], num_trials: int) -> None:
        self._trials = trials
        self._num_trials = num_trials
        self.display = LiveText(self._text) if sys.stdout.isatty() else nullcontext()
        """A context that has the terminal."""
        self._began = time.monotonic()
        self._line_at = self._began

    def news(self, line: str) -> None:
        """Show an event."""
        if isinstance(self.display, LiveText):
            self.display.refresh()
        else:
            self._line_at = time.monotonic()
            print(line, flush=True)

    def tick(self) -> None:
        """Print the running trials once per interval, without a terminal; to be called often."""
        now = time.monotonic()
        if not isinstance(self.display, LiveText) and now - self._line_at >= LINE_INTERVAL_S:
            trials = self._trials()
            running = ", ".join(trial.name for trial in trials if trial.status == "running") or "none"
            done = f"{self._done(trials)} done after {now - self._began:.0f} s"
            self.news(f"{done}, running: {running}")

    def _text(self) -> str:
        trials = self._trials()
        rows = []
        for trial in trials[-SHOWN:]:
            status = trial.status + (f": {trial.reason}" if trial.reason else "")
            row = [trial.name, status, "", "", changes_text(trial.changes)]
            if trial.last:
                row[2] = f"{trial.images_seen:,}"
                row[3] = shown(trial.last.bits_per_dim)
            rows.append(row)
        table = Table(["trial", "status", "images", "bits/dim", "changes"], rows, num_words=2)
        return f"{self._done(trials)}\n{table.text(1000) if rows else ''}"

    def _done(self, trials: Sequence[Trial]) -> str:
        over = sum(trial.status != "running" for trial in trials)
        return f"{over} of {max(self._num_trials, len(trials))} trials"
