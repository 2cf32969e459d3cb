"""Record a training of which a worker is killed: python docs/record.py [--out docs/resume.svg]

Trains the digits in a terminal of its own, kills a worker, and writes an animated SVG of the screens that it showed.
The time between two of them is shortened. The last screen has the digests of the final weights, and of those of a run
that was not disturbed; if they differ, nothing is written.
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

import psutil
import tyro
from rich.console import Console
from rich.text import Text

REPO = Path(__file__).resolve().parent.parent
WORDS = ["jobs/train.py", "digits", "--workers", "2"]
HOME = "/home/you"
"""What stands for the folder of the recording."""
COLUMNS = 96
ROWS = 19
SEEN = re.compile(r"([\d,]+) of ([\d,]+) ")
"""Images seen, and all, on a screen."""
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

    out: Path = REPO / "docs/resume.svg"
    """The file."""
    num_frames: int = 18
    """Screens in it."""
    frame_s: float = 0.7
    """Seconds that each is shown."""
    total_images: int = 48_000
    """Images to train on."""


class Terminal:
    """Lines with their colours, after what a program has written: text, colours, cursor up, and line erased."""

    def __init__(self, first: str) -> None:
        self._lines = [first, ""]
        self._row = 1
        self._at_start = True

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


def screens(words: list[str], folder: str, *, kill: bool) -> list[tuple[float, str]]:
    """Train in a terminal, in `folder`; all the screens it showed, and when.

    With `kill`, a worker is killed after six tenths of the images, which later screens show as another terminal.
    """
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    shown = list[tuple[float, str]]()
    terminal = Terminal(f"$ python {' '.join(words)}")
    typed = ""
    process = subprocess.Popen(
        [sys.executable, str(REPO / words[0]), *words[1:]],
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
        seen = [int(number.replace(",", "")) for pair in SEEN.findall(terminal.screen) for number in pair]
        if kill and not typed and seen and seen[-2] > 0.6 * seen[-1]:
            below = psutil.Process(process.pid).children(recursive=True)
            worker = next(child for child in below if "RayTrainWorker" in " ".join(child.cmdline()))
            worker.kill()
            typed = f"{'─' * COLUMNS}\n# in another terminal: one of the two workers\n$ kill -9 {worker.pid}"
        rows = terminal.screen.count("\n")
        shown.append((time.monotonic(), terminal.screen + "\n" * (ROWS - rows) + typed))
    if process.wait():
        raise SystemExit(f"it ended with {process.returncode}:\n{terminal.screen}")
    return shown


def digests(folder: Path) -> str:
    """A command that prints the digests of the final weights of all runs, and what it printed: they must be equal."""
    final = max((folder / "runs/undisturbed").glob("checkpoint-*")).name.partition("-g")[0]
    command = f"md5sum runs/*/{final}-*/ema.safetensors"
    printed = subprocess.check_output(command, shell=True, cwd=folder, text=True).rstrip()
    if len({line.split()[0] for line in printed.splitlines()}) != 1:
        raise SystemExit(printed)
    return f"$ {command}\n{printed}"


def _read(terminal: int) -> str:
    """What the program writes next; "" at its end."""
    try:
        return os.read(terminal, 1 << 16).decode(errors="replace")
    except OSError:  # how Linux says that the other side is closed
        return ""


def animation(frames: list[str], frame_s: float) -> str:
    """Frames as one SVG that shows them in turn, for ever."""
    wrapped = [Text.from_ansi(frame).wrap(Console(width=COLUMNS), COLUMNS) for frame in frames]
    drawn = []
    rows = max(map(len, wrapped))
    for i, lines in enumerate(wrapped):
        console = Console(record=True, width=COLUMNS, height=rows, file=io.StringIO())
        console.print(Text("\n").join([*lines, *[Text(" ")] * (rows - len(lines))]), end="")
        svg = console.export_svg(code_format=FORMAT, unique_id=f"f{i}")
        drawn.append(f'<g class="frame" style="animation-delay: {i * frame_s:g}s">{svg}</g>')
    size = re.search(r'viewBox="[^"]*"', drawn[0])
    assert size, "rich writes it"
    whole = len(frames) * frame_s
    share = 100 / len(frames)
    style = (
        f".frame {{ visibility: hidden; animation: shown {whole:g}s step-end infinite }} "
        f"@keyframes shown {{ 0% {{ visibility: visible }} {share:.4f}% {{ visibility: hidden }} }}"
    )
    begin = f'<svg xmlns="http://www.w3.org/2000/svg" {size[0]} role="img" aria-label="A terminal">'
    return "\n".join([begin, f"<style>{style}</style>", *drawn, "</svg>"])


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    words = [*WORDS, "--total-images", str(arguments.total_images), "--name"]
    with tempfile.TemporaryDirectory() as folder:
        shown = screens([*words, "killed"], folder, kill=True)
        screens([*words, "undisturbed"], folder, kill=False)
        began, _ = shown[0]
        ended, last = shown[-1]
        last += "\n" + digests(Path(folder))
    shown = [(at, screen.replace(folder, HOME)) for at, screen in shown]
    last = last.replace(folder, HOME)
    times = [began + (ended - began) * i / (arguments.num_frames - 1) for i in range(arguments.num_frames)]
    frames = [[screen for at, screen in shown if at <= moment][-1] for moment in times[:-1]]
    arguments.out.write_text(animation([*frames, *[last] * 5], arguments.frame_s))
    print(f"{arguments.out}  {arguments.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
