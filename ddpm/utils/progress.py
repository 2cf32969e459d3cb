"""Progress display, with rich on a terminal: a bar, or text that is redrawn; one line per interval elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Self, TypeVar

T = TypeVar("T")

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


def shortened(line: str, max_length: int) -> str:
    """`line`, with "..." in place of its middle if it is longer: its ends name the file and the reason."""
    half = (max_length - 5) // 2
    return line if len(line) <= max_length else f"{line[:half]} ... {line[-half:]}"


class LiveText:
    """A context that shows the lines of `text` on a terminal, redrawn by `refresh`; they may have ANSI colours."""

    def __init__(self, text: Callable[[], str]) -> None:
        from rich.live import Live  # imported here, since most processes show nothing
        from rich.text import Text

        def line() -> Text:
            return Text.from_ansi(text(), no_wrap=True, overflow="ellipsis")

        self._live = Live(get_renderable=line, auto_refresh=False)
        self.has_unicode = self._live.console.encoding.startswith("utf")

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def refresh(self) -> None:
        self._live.refresh()


class Display:
    """A context that shows how many of `total` are done; `description` names what is counted."""

    def __init__(self, description: str, total: int) -> None:
        self._description = description
        self._total = total
        self._live = sys.stdout.isatty()
        self._began = time.monotonic()
        self._line_at = float("-inf")
        self._first: int | None = None
        self._shown = -1
        self._done = 0
        self._detail = ""
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

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._bar.stop()
        elif self._first is not None:
            self._print(self._done, self._detail)

    def update(self, done: int, detail: str = "") -> None:
        """Show that `done` of the total are done, with `detail` beside it."""
        if self._live:
            self._bar.update(self._task, completed=done, detail=detail)
            return
        self._done = done
        self._detail = detail
        if done >= self._total or time.monotonic() - self._line_at >= LINE_INTERVAL_S:
            self._print(done, detail)

    def _print(self, done: int, detail: str) -> None:
        """Print a line, unless the last one had the same count."""
        if done == self._shown:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = done
            self._began = now
        self._line_at = now
        self._shown = done
        speed = (done - self._first) / (now - self._began) if now > self._began else 0.0
        left = f"{(self._total - done) / speed:.0f} s left" if speed > 0 and done < self._total else ""
        parts = [f"{self._description} {done:,}/{self._total:,}", detail, left]
        print(printable("  ".join(part for part in parts if part)), flush=True)


def track(
    description: str, total: int, items: Iterable[T], size: Callable[[T], int] = lambda item: 1
) -> Iterator[T]:
    """Yield the items, with a display of how much of the total they are so far."""
    done = 0
    with Display(description, total) as display:
        for item in items:
            yield item
            done += size(item)
            display.update(done)
