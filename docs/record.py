"""Record what training looks like on a terminal: python docs/record.py [--out docs/train.svg]

Trains the digits in a terminal of its own, as `make train` does, and writes an animated SVG of the screens that it
showed. The time between two of them is shortened.
"""

import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import tyro
from rich.console import Console
from rich.text import Text

REPO = Path(__file__).resolve().parent.parent
WORDS = ["jobs/train.py", "digits", "--name", "digits", "--workers", "2"]
"""What `make train` runs."""
COLUMNS, ROWS = 96, 19
PIECE = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")
FORMAT = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>{styles} .{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px;
line-height: {line_height}px }}</style>
<defs>{lines}</defs><rect width="100%" height="100%" rx="8" fill="#292929"/>
<g transform="translate({terminal_x}, {terminal_y})">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g></svg>"""


@dataclass(frozen=True)
class Arguments:
    """Where the recording goes, and how long it is."""

    out: Path = REPO / "docs/train.svg"
    """The file."""
    num_frames: int = 14
    """Screens in it."""
    frame_s: float = 0.8
    """Seconds that each is shown."""
    total_images: int | None = None
    """Images to train on; None: the preset's."""


class Terminal:
    """Lines with their colours, after what a program has written: text, colours, cursor up, and line erased."""

    def __init__(self, first: str) -> None:
        self._lines, self._row, self._at_start = [first, ""], 1, True

    def feed(self, written: str) -> None:
        for code, command, moved, text in PIECE.findall(written):
            if moved == "\n":
                self._row += 1
                self._lines += [""] * (self._row + 1 - len(self._lines))
            elif command == "A":
                self._row -= int(code or 1)
            elif command == "K":
                self._lines[self._row] = ""
            elif command == "m" or text:
                kept = "" if self._at_start else self._lines[self._row]
                self._lines[self._row] = kept + (text or f"\x1b[{code}m")
            self._at_start = bool(moved) or (self._at_start and command in ("A", "K"))

    @property
    def screen(self) -> str:
        """The last lines."""
        return "\n".join(self._lines[: self._row + 1][-ROWS:])


def screens(words: list[str], shown_as: str) -> list[tuple[float, str]]:
    """Run Python with `words` in a terminal; all the screens it showed below the line `shown_as`, and when."""
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    shown, terminal = [], Terminal(shown_as)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env=os.environ | {"TERM": "xterm-256color", "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"},
            start_new_session=True,
        )
        os.close(theirs)
        while written := _read(ours):
            terminal.feed(written)
            shown.append((time.monotonic(), terminal.screen))
        if process.wait():
            raise SystemExit(f"it ended with {process.returncode}:\n{terminal.screen}")
    return shown


def _read(terminal: int) -> str:
    """What the program writes next; "" at its end."""
    try:
        return os.read(terminal, 1 << 16).decode(errors="replace")
    except OSError:  # how Linux says that the other side is closed
        return ""


def animation(frames: list[str], frame_s: float) -> str:
    """Frames as one SVG that shows them in turn, for ever."""
    drawn = []
    for i, frame in enumerate(frames):
        console = Console(record=True, width=COLUMNS, height=ROWS, file=io.StringIO())
        console.print(Text.from_ansi(frame + "\n" * (ROWS - 1 - frame.count("\n"))), end="")
        svg = console.export_svg(code_format=FORMAT, unique_id=f"f{i}")
        drawn.append(f'<g class="frame" style="animation-delay: {i * frame_s:g}s">{svg}</g>')
    size = re.search(r'viewBox="[^"]*"', drawn[0])
    assert size, "rich writes it"
    whole, share = len(frames) * frame_s, 100 / len(frames)
    style = (
        f".frame {{ visibility: hidden; animation: shown {whole:g}s step-end infinite }} "
        f"@keyframes shown {{ 0% {{ visibility: visible }} {share:.4f}% {{ visibility: hidden }} }}"
    )
    begin = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size[0]} role="img" aria-label="Training in a terminal">'
    )
    return "\n".join([begin, f"<style>{style}</style>", *drawn, "</svg>"])


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    more = ["--total-images", str(arguments.total_images)] if arguments.total_images else []
    script, *words = WORDS + more
    shown = screens([str(REPO / script), *words], f"$ python {' '.join([script, *words])}")
    (began, _), (ended, last) = shown[0], shown[-1]
    times = [began + (ended - began) * i / (arguments.num_frames - 1) for i in range(arguments.num_frames)]
    frames = [[screen for at, screen in shown if at <= moment][-1] for moment in times[:-1]]
    arguments.out.write_text(animation([*frames, last, last, last], arguments.frame_s))
    print(f"{arguments.out}  {arguments.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
