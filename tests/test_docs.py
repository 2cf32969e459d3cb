"""The documentation: its commands parse, its files exist, and its numbers are those of the tables that it names."""

import importlib
import re
import shlex
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from support.processes import REPO

from ddpm import cli
from ddpm.search.leaderboard import FEWER_TIMESTEPS
from ddpm.utils.errors import UserError

PAGES = [
    REPO / "README.md",
    REPO / "CONTRIBUTING.md",
    *sorted((REPO / "docs").rglob("*.md")),
    *sorted((REPO / "examples").rglob("*.md")),
]
SCRIPT = re.compile(r"(jobs|tune)/(\w+)\.py")
ENDS = {"&&", ";", "|", ">"}
PATH = re.compile(r"(?<![\w/.}~-])(?:ddpm|jobs|tune|tests|infra|benchmarks|docs|examples)/[\w./-]*")
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)")
SECRETS = {"ddpm/mlflow-admin"}
"""Names that look like paths."""
RUN_BY_ITS_OWN_TEST = REPO / "docs/extending.md"
"""Its commands and files are those of diffs and a package that tests/test_extending.py applies."""


def blocks(text: str) -> Iterator[str]:
    """Fenced and indented blocks, and inline code."""
    fenced = re.compile(r"^( *)```\w*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    yield from (match[2] for match in fenced.finditer(text))
    text = fenced.sub("", text)
    indented = re.compile(r"(?:^ {4}.*\n|^ {4,}\n)+", re.MULTILINE)
    yield from indented.findall(text)
    yield from re.findall(r"`([^`]+)`", indented.sub("", text))


def commands(text: str) -> Iterator[list[str]]:
    """Every command of a page as words, without comments and pipes."""
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # prose with an apostrophe
                continue
            begin = 0
            for i, word in enumerate([*words, ";"]):
                if word in ENDS:
                    yield words[begin:i]
                    begin = i + 1


COMMANDS = {
    " ".join(words): words
    for page in PAGES
    if page != RUN_BY_ITS_OWN_TEST
    for words in commands(page.read_text())
    if words
}


def scripts() -> Iterator[tuple[str, list[str], str]]:
    """Module, arguments and PYTHONPATH of every command that is one of our jobs, also behind `ray job submit`."""
    for words in COMMANDS.values():
        path = words[0].removeprefix("PYTHONPATH=") if words[0].startswith("PYTHONPATH=") else ""
        for i, word in enumerate(words):
            if (match := SCRIPT.fullmatch(word)) and i > 0 and words[i - 1].endswith("python"):
                yield f"{match[1]}.{match[2]}", words[i + 1 :], path


def test_commands_are_found() -> None:
    modules = {f"jobs.{path.stem}" for path in (REPO / "jobs").glob("*.py")}
    assert {module for module, _, _ in scripts()} == modules | {"tune.search"}
    assert "make train" in COMMANDS and "ray up -y cluster.yaml" in COMMANDS


class Parsed(Exception):
    pass


@pytest.mark.parametrize(("module", "arguments", "path"), list(scripts()), ids=str)
def test_jobs_take_their_arguments(
    module: str, arguments: list[str], path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parse = cli.parse

    def parse_only(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.chdir(tmp_path)
    if path:
        monkeypatch.syspath_prepend(REPO / path)
    if "--config" in arguments:
        file = Path(arguments[arguments.index("--config") + 1])
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    (tmp_path / "~/pictures").mkdir(parents=True)
    for name in ("one", "two"):
        Image.new("L", (8, 8)).save(tmp_path / f"~/pictures/{name}.png")
    monkeypatch.setattr(cli, "parse", parse_only)
    monkeypatch.setattr(sys, "argv", [f"{module.replace('.', '/')}.py", *arguments])
    try:
        importlib.import_module(module).main()
    except (Parsed, UserError) as error:  # files of a source, which are not in the repository
        assert isinstance(error, Parsed) or module == "jobs.prepare"
    except SystemExit as error:
        assert error.code == 0 and "--help" in arguments


def test_other_commands_name_what_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    for command, words in COMMANDS.items():
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets, command
        if len(words) > 1 and words[0].endswith("python") and words[1].endswith(".py"):
            assert (REPO / words[1]).is_file(), command
        if words[:1] == ["ray"]:
            for file in (word for word in words if word.endswith(".yaml")):
                assert (REPO / file).is_file(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in headings]
    for path in set(PATH.findall(text)) - SECRETS if page != RUN_BY_ITS_OWN_TEST else ():
        assert (REPO / path.rstrip(".")).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_numbers_are_those_of_the_tables_named_beside_them(page: Path) -> None:
    """Each number with decimals in a paragraph that links to benchmarks/*.md; the table may have more digits."""
    for paragraph in re.split(r"\n\n|\n- ", page.read_text()):
        tables = re.findall(r"\]\(((?:\.\./)?benchmarks/[\w-]+\.md)\)", paragraph)
        there = [number for table in tables for number in NUMBER.findall((page.parent / table).read_text())]
        for quoted in NUMBER.findall(paragraph) if tables else ():
            digits = len(quoted.partition(".")[2])
            assert any(f"{float(number):.{digits}f}" == quoted for number in there), (quoted, tables)


def test_each_table_names_its_script() -> None:
    for table in (REPO / "benchmarks").glob("*.md"):
        scripts = re.findall(r"python (benchmarks/\w+\.py)", table.read_text())
        assert scripts and all((REPO / script).is_file() for script in scripts), table.name


def test_what_t_alone_explains_is_what_was_measured() -> None:
    measured = (REPO / "benchmarks/honesty.md").read_text()
    for value, T in (quoted := re.findall(r"(0\.\d+)\D*? at (\d+)", FEWER_TIMESTEPS)):
        row = re.search(rf"^\| {T} \|.*\(\+([\d.]+) ± [\d.]+\) \|$", measured, re.MULTILINE)
        assert row and f"{float(row[1]):.2f}" == value, T
    assert len(quoted) == 3


def test_the_readme_begins_with_what_is_required() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    bounds = {wants.name: wants.specifier for wants in map(Requirement, project["dependencies"])}
    at_least = {name: next(s.version for s in bounds[name] if s.operator == ">=") for name in bounds}
    below = Version(next(s.version for s in bounds["ray"] if s.operator == "<"))
    required = [
        project["license"],
        "Linux",
        f"Python {project['requires-python'].removeprefix('>=')} or newer",
        f"PyTorch {at_least['torch']} or newer",
        f"Ray {at_least['ray']} to {below.major}.{below.minor - 1}",
    ]
    line = (REPO / "README.md").read_text().splitlines()[2]
    assert line == " · ".join(required)


def test_the_file_tree_is_the_tree() -> None:
    (tree,) = (block for block in blocks((REPO / "README.md").read_text()) if block.startswith("ddpm/"))
    listed, folder = set(), ""
    for line in tree.splitlines():
        names = re.match(r" *(?:[\w.]+/? {2,})+", line)
        assert names, line
        folder = folder if line.startswith(" ") else ""
        for name in names[0].split():
            assert (REPO / folder / name).exists(), name
            listed.add(f"{folder}{name}")
        folder = folder if line.startswith(" ") else names[0].split()[0]
    paths = [path for path in (REPO / "ddpm").iterdir() if not path.name.startswith(("__", "py.typed"))]
    there = {f"ddpm/{path.name}{'/' if path.is_dir() else ''}" for path in paths}
    assert there == {name for name in listed if name.startswith("ddpm/") and name != "ddpm/"}


def test_the_recording_is_small_and_shows_a_run_that_resumes_with_the_same_weights() -> None:
    file = REPO / "docs/resume.svg"
    assert file.stat().st_size < 300_000
    frames = ElementTree.parse(file).getroot().findall("{http://www.w3.org/2000/svg}g")
    begin, end = ("".join(frames[i].itertext()).replace("\xa0", " ") for i in (0, -1))
    assert "jobs/train.py" in begin and "starting" not in end
    for part in ("images/s", "goodput", "held-out", "checkpoint", "samples", "kill -9", "resuming"):
        assert part in end, part
    killed, undisturbed = re.findall(r"([0-9a-f]{32})\s+runs/(?:killed|undisturbed)/", end)
    assert killed == undisturbed


def test_the_animation_is_small_and_has_a_frame_for_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPO / "docs")
    few = ["--columns", "2", "--rows", "1", "--num-sample-steps", "3", "--out", str(tmp_path / "few.gif")]
    monkeypatch.setattr(sys, "argv", ["animation.py", *few])
    importlib.import_module("animation").main()
    committed = REPO / "docs/noise-to-digits.gif"
    for file, columns, rows, steps in ((tmp_path / "few.gif", 2, 1, 3), (committed, 16, 3, 50)):
        assert file.stat().st_size < 600_000
        with Image.open(file) as gif:
            assert gif.size == (50 * columns + 2, 50 * rows + 2) and gif.n_frames == steps + 1
