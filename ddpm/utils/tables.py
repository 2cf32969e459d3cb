"""Tables of text: laid out by pandas on a terminal, or written as Markdown."""

import shutil
import sys
from collections.abc import Sequence
from typing import NamedTuple

PAGE_WIDTH = 200
"""Columns of a file or a pipe."""


class Table(NamedTuple):
    """Names of columns, and rows of cells."""

    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_words: int = 1
    """The first columns hold words: they are aligned left, and repeated where the other columns do not fit."""

    def text(self, width: int) -> str:
        """The table for a terminal; columns that do not fit are below."""
        import pandas as pd  # imported here, since it takes half a second

        words = list(self.names[: self.num_words])
        index = [row[0] for row in self.rows]
        if self.num_words > 1:
            rows = [tuple(row[: self.num_words]) for row in self.rows]
            index = pd.MultiIndex.from_tuples(rows, names=words)
        cells = [row[self.num_words :] for row in self.rows]
        frame = pd.DataFrame(cells, index=index, columns=self.names[self.num_words :])
        if self.num_words == 1:
            frame.columns.name = self.names[0]  # in the line of the other names
        return str(frame.to_string(line_width=width))

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.names, ["---"] * len(self.names), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)

    def show(self) -> None:
        """Print the table."""
        print(self.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else PAGE_WIDTH))


def estimate(value: float, error: float) -> str:
    """A value with its standard error."""
    is_tiny = 0 < abs(value) < 5e-5
    return f"{value:.0e} ± {error:.0e}" if is_tiny else f"{value:.4f} ± {error:.4f}"
