"""docs/reference: the generated pages are those of the code, and have every flag."""

import dataclasses
import re
import runpy
import sys

import pytest
from support.processes import REPO

from ddpm.cli import program
from ddpm.config.json import flatten
from ddpm.config.tree import Config
from ddpm.runs.checkpoint import check_same_run
from ddpm.utils.errors import UserError

FOLDER = REPO / "docs/reference"
WRITER = runpy.run_path(str(REPO / "docs/write_reference.py"), run_name="imported")
FLAG = re.compile(r"--[a-z][\w.-]+")
ROW = re.compile(r"^\| `--(?P<key>[\w.-]+)`[^|]*\|[^|]*\|(?:\\\||[^|])*\| (?P<resume>[^|]+) \|", re.MULTILINE)
ARGUMENTS = {"train": ["digits"], "search": ["digits"], "prepare": ["folder"]}


@pytest.mark.parametrize("name", ["commands.md", "configuration.md", "presets.md"])
def test_a_generated_page_is_that_of_the_code(name: str) -> None:
    is_same = WRITER["pages"]()[name] == (FOLDER / name).read_text()
    assert is_same, f"docs/reference/{name} is stale: `make reference` renews it"


@pytest.mark.parametrize("command", list(program.COMMANDS))
def test_the_flags_of_the_help_are_on_the_pages(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ddpm", command, *ARGUMENTS.get(command, []), "--help-all"])
    with pytest.raises(SystemExit):
        program.main()
    shown = {flag for flag in FLAG.findall(capsys.readouterr().out) if not re.search(r"(--|\.)no-", flag)}
    pages = (FOLDER / "commands.md").read_text() + (FOLDER / "configuration.md").read_text()
    assert shown - {"--help"} - set(FLAG.findall(pages)) == set()


def test_the_pages_say_which_settings_a_run_may_change() -> None:
    """A setting may be changed if the check of a run that resumes accepts another value."""
    rows = {
        match["key"]: match["resume"].strip()
        for match in ROW.finditer((FOLDER / "configuration.md").read_text())
    }
    config = Config()
    keys = list(flatten(config))
    assert list(rows) == [key.replace("_", "-") for key in keys]
    for key in keys:
        group, name = key.split(".")
        changed = dataclasses.replace(getattr(config, group), **{name: "another value"})
        said = rows[key.replace("_", "-")]
        try:
            check_same_run(config, dataclasses.replace(config, **{group: changed}), "here")
        except UserError:
            assert said in ("no", "same images"), key
        else:
            assert said != "no", key
