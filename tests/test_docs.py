"""The documentation: its commands parse, its links resolve, and the files that it names exist."""

import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.processes import REPO

from ddpm.cli import parsing, program
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
GENERATED = [REPO / f"docs/reference/{name}.md" for name in ("commands", "configuration", "presets")]
"""Their commands are synopses, which tests/test_reference.py compares with the help."""


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
    if page not in (RUN_BY_ITS_OWN_TEST, *GENERATED)
    for words in commands(page.read_text())
    if words
}


def our_commands() -> Iterator[tuple[str, list[str], str]]:
    """Name, arguments and PYTHONPATH of every command of ours, also as a script, and behind `ray job submit`.

    A mention without arguments, or with "..." among them, is no command.
    """
    for words in COMMANDS.values():
        path = words[0].removeprefix("PYTHONPATH=") if words[0].startswith("PYTHONPATH=") else ""
        for i, (program_name, word) in enumerate(pairwise(words)):
            name = ""
            arguments = words[i + 2 :]
            if program_name == "ddpm" and word in program.COMMANDS:
                name = word
            elif program_name.endswith("python") and (match := SCRIPT.fullmatch(word)):
                name = match[2]
            is_whole = name == "ui" or (arguments and not any("..." in argument for argument in arguments))
            if name and is_whole:
                yield name, arguments, path


def test_commands_are_found() -> None:
    assert {name for name, _, _ in our_commands()} == program.COMMANDS.keys()
    assert "make train" in COMMANDS and "ray up -y cluster.yaml" in COMMANDS


class Parsed(Exception):
    pass


@pytest.mark.parametrize(("name", "arguments", "path"), list(our_commands()), ids=str)
def test_commands_take_their_arguments(
    name: str, arguments: list[str], path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
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
    for kind in ("flower", "temple"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / f"photos/{kind}/one.png")
    monkeypatch.setattr(parsing, "parse", parse_only)
    monkeypatch.setattr(sys, "argv", [f"ddpm {name}", *arguments])
    try:
        importlib.import_module(f"ddpm.cli.{name}").main()
    except (Parsed, UserError) as error:  # images, data sets and weights, which are not in the repository
        reads_files = arguments[:1] == ["folder"] and {"--data", "--autoencoder"} & {*arguments}
        assert isinstance(error, Parsed) or name == "prepare" or reads_files
    except SystemExit as error:
        assert error.code == 0 and {"--help", "--help-all"} & {*arguments}


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
    folders = ("docs", "benchmarks", "examples")
    pages = [*REPO.glob("*.md"), *(page for folder in folders for page in (REPO / folder).rglob("*.md"))]
    assert sorted(leaves(navigation)) == sorted(str(page.relative_to(REPO)) for page in pages)


def test_the_file_tree_is_the_tree() -> None:
    page = REPO / "docs/design/architecture.md"
    (tree,) = (block for block in blocks(page.read_text()) if block.startswith("ddpm/  "))
    listed = set()
    folder = ""
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
