"""Progress display: one live bar in a terminal, one line per interval elsewhere."""

import sys
import time
from dataclasses import dataclass

LINE_INTERVAL_S = 10.0


@dataclass(frozen=True)
class Progress:
    """State of training for display."""

    images_seen: int
    total_images: int
    images_per_s: float
    loss: float


def printable(text: str) -> str:
    """`text` in one line, with unprintable characters as Python's escapes.

    File names and texts from files come from outside: a line break in them could forge a line of output, an escape
    sequence could colour or remove one, and a name that is not UTF-8 could not be printed.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Display:
    """A context that shows how many of `total` are done; `description` names what is counted."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total = description, total
        self._live = sys.stdout.isatty()
        self._began, self._line_at = time.monotonic(), float("-inf")
        self._first: int | None = None
        self._shown = -1
        self._last = (0, "")
        if self._live:
            from rich import progress  # imported here, since most processes show nothing

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[detail]}", markup=False),
                progress.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task(description, total=total, detail="")

    def __enter__(self) -> "Display":
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._bar.stop()
        elif self._first is not None:
            self._print(*self._last)

    def update(self, done: int, detail: str = "") -> None:
        """Show that `done` of the total are done, with `detail` beside it."""
        if self._live:
            self._bar.update(self._task, completed=done, detail=detail)
            return
        self._last = (done, detail)
        if done >= self._total or time.monotonic() - self._line_at >= LINE_INTERVAL_S:
            self._print(done, detail)

    def _print(self, done: int, detail: str) -> None:
        """Print a line, unless the last one had the same count."""
        if done == self._shown:
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._began = done, now
        self._line_at, self._shown = now, done
        speed = (done - self._first) / (now - self._began) if now > self._began else 0.0
        left = f"{(self._total - done) / speed:.0f} s left" if speed > 0 and done < self._total else ""
        parts = [f"{self._description} {done:,}/{self._total:,}", detail, left]
        print(printable("  ".join(part for part in parts if part)), flush=True)
