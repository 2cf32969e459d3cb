"""The documentation: its commands parse, its links resolve, and the files that it names exist."""

import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.processes import REPO

from ddpm.cli import parsing
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
RUN_BY_ITS_OWN_TEST = REPO / "docs/design/extending.md"
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
    parse = parsing.parse

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
    monkeypatch.setattr(parsing, "parse", parse_only)
    monkeypatch.setattr(sys, "argv", [f"{module.replace('.', '/')}.py", *arguments])
    try:
        importlib.import_module(f"ddpm.cli.{module.rpartition('.')[2]}").main()
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
    for path in PATH.findall(text) if page != RUN_BY_ITS_OWN_TEST else ():
        assert (REPO / path.rstrip(".")).exists(), path


def leaves(navigation: Any) -> Iterator[str]:
    """The files of a navigation, which is a tree of lists and of tables from titles."""
    if isinstance(navigation, str):
        yield navigation
    else:
        for entry in navigation.values() if isinstance(navigation, dict) else navigation:
            yield from leaves(entry)


def test_each_page_is_in_the_navigation_once() -> None:
    """`make docs` finds dead links, but no page that is missing."""
    navigation = tomllib.loads((REPO / "zensical.toml").read_text())["project"]["nav"]
    pages = [*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md"), *(REPO / "benchmarks").glob("*.md")]
    assert sorted(leaves(navigation)) == sorted(str(page.relative_to(REPO)) for page in pages)


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
