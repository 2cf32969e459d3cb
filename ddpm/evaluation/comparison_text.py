"""The comparison of runs as lines for a terminal: the answer, and a table of the runs."""

from collections.abc import Iterator, Sequence

from ddpm.evaluation.compared_run import ComparedRun
from ddpm.evaluation.comparison import Answer
from ddpm.utils.progress import printable, shortened
from ddpm.utils.tables import Table

ON_THE_PAGE_ALONE = ("hardware", "versions")
"""Facts that are too long for a table on a terminal."""
MAX_CELL = 30
"""Characters of a cell."""


def table(runs: Sequence[ComparedRun], answer: Answer) -> Table:
    """The facts of the runs: a row for each fact, and a column for each run."""
    titles = dict.fromkeys(title for run in runs for title in run.facts if title not in ON_THE_PAGE_ALONE)
    names = ["run", *(_cell(f"{answer.letters[run.key]} ({run.name})") for run in runs)]
    rows = [[_cell(title), *(_cell(run.facts.get(title, "unknown")) for run in runs)] for title in titles]
    return Table(names, rows)


def lines(answer: Answer) -> Iterator[str]:
    """Which run is better, and the command that evaluates them."""
    for verdict in answer.verdicts:
        yield f"{verdict.metric}: {verdict.headline}. {verdict.detail}"
    if answer.verdicts:
        yield "Lower is better; ± is one standard error, without the spread between seeds of training."
    if answer.step is not None:
        yield answer.step.text
        yield f"    {answer.step.command}"


def _cell(text: str) -> str:
    return shortened(printable(text), MAX_CELL)
