"""docs/results.md and README.md quote the tables of benchmarks/; findings of a report quote its own numbers."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import tables
from support.processes import REPO

REPORTS = sorted((REPO / "benchmarks").glob("*.md"))
RESULTS = REPO / "docs/results.md"
LINK = re.compile(r"\]\((?:\.\./)?(benchmarks/[\w-]+\.md)\)")
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
VALUE = re.compile(rf"(?<![\w.,]){NUMBER}(?: ± {NUMBER})?(?![\w]|[.,]\d)")
PRECISE = re.compile(r"(?<![\w.,§-])\d+(?:,\d{3})*\.\d+(?: ± \d+\.\d+)?(?![\w.]\d)")
"""In prose, numbers with a decimal point."""


def rows(text: str) -> Iterator[list[str]]:
    """The rows of the tables in Markdown, without their heads."""
    is_head = True
    for line in text.splitlines():
        if not line.startswith("|"):
            is_head = True
        elif not re.fullmatch(r"[|\s:-]+", line):
            if not is_head:
                yield [cell.strip() for cell in line.strip("|").split(" | ")]
        else:
            is_head = False


def sections(text: str) -> Iterator[str]:
    """The parts of a page between headings of the second level."""
    yield from re.split(r"^## ", text, flags=re.MULTILINE)


def plain(label: str) -> str:
    """CIFAR-10 and cifar10 are one label."""
    return re.sub(r"\W", "", label.lower())


def quoted_rows() -> Iterator[tuple[list[str], list[str]]]:
    """Row and linked reports of each table of docs/results.md."""
    for section in sections(RESULTS.read_text()):
        links = list(dict.fromkeys(LINK.findall(section)))
        yield from ((row, links) for row in rows(section))


def values(cells: list[str]) -> set[str]:
    """The numbers of cells, each also without its error."""
    found = {value for cell in cells for value in VALUE.findall(cell)}
    return found | {value.partition(" ± ")[0] for value in found}


@pytest.mark.parametrize(("row", "links"), list(quoted_rows()))
def test_a_quoted_row_is_in_a_table_of_a_report(row: list[str], links: list[str]) -> None:
    """In the rows with its label, if any row of the reports has it."""
    there = [found for link in links for found in rows((REPO / link).read_text())]
    alike = [found for found in there if plain(row[0]) in map(plain, found)]
    known = values([cell for found in alike or there for cell in found])
    assert values(row[1:]) - known == set()


def test_numbers_in_the_text_of_results_are_in_the_reports() -> None:
    for section in sections(RESULTS.read_text()):
        links = LINK.findall(section)
        if section.startswith("Findings"):
            links = [str(report.relative_to(REPO)) for report in REPORTS]
        if links:
            known = " ".join((REPO / link).read_text() for link in links)
            text = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
            assert [number for number in PRECISE.findall(text) if number not in known] == []


def test_the_results_on_the_front_page_are_those_of_the_benchmark() -> None:
    """README.md quotes benchmarks/quality.md: KID of each trainer, and the least and most times sooner."""
    front = (REPO / "README.md").read_text()
    race = (REPO / "benchmarks/quality.md").read_text().partition("<!-- by hand")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in race.splitlines()]
    for name, shown in (("cifar10", "CIFAR-10"), ("emoji", "emoji"), ("figures", "figures of a game")):
        of_set = [row for row in rows if row[:1] == [name]]
        kid = {(row[1], row[2].startswith("ours, ")): row[3] for row in of_set if len(row) == 8}
        (sooner,) = [row[4] for row in of_set if len(row) == 5 and row[2].startswith("ours, ")]
        times = sorted(float(value) for value in sooner.split(","))
        quoted = [kid["ours", False], kid["diffusers", True], kid["diffusers", False]]
        ends = f"{times[0]:.1f} to {times[-1]:.1f} times sooner"
        assert f"| {' | '.join([shown, *quoted, ends])} |" in front


@pytest.mark.parametrize("report", REPORTS, ids=lambda page: page.stem)
def test_a_report_begins_with_findings_in_its_own_numbers(report: Path) -> None:
    text = report.read_text()
    assert text.split("\n\n")[1] == tables.REPORT
    findings = text.partition("## Findings\n")[2].partition(tables.MEASURED)[0].partition("\n## ")[0]
    assert findings.strip()
    rest = text.replace(findings, "")
    assert [number for number in PRECISE.findall(findings) if number not in rest] == []


def test_a_benchmark_keeps_what_is_written_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "folder", tmp_path)
    page = tmp_path / "speed.md"
    tables.write("speed.py", "Speed", "old", raw=["old data"])
    page.write_text(page.read_text().replace(tables.MEASURED, f"## Findings\n\nFast.\n\n{tables.MEASURED}"))
    page.write_text(page.read_text().replace(tables.RAW, f"{tables.BY_HAND}\n\nWhy.\n\n{tables.RAW}"))
    tables.write("speed.py", "Speed", "new", raw=["new data"])
    parts = [
        "# Speed",
        tables.REPORT,
        "## Findings",
        "Fast.",
        tables.MEASURED,
        "new",
        tables.BY_HAND,
        "Why.",
    ]
    assert page.read_text().split("\n\n") == [*parts, tables.RAW, "new data\n"]
