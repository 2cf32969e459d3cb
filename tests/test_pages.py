"""The pages of `make docs`: all are in the navigation, no link of theirs is dead, and opening one fetches nothing."""

import re
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from support.processes import REPO, run

FOLDERS = ("docs", "benchmarks")
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "zensical.toml")


def leaves(navigation: Any) -> Iterator[str]:
    """The files of a navigation, which is a tree of lists and of tables from titles."""
    if isinstance(navigation, str):
        yield navigation
    else:
        for entry in navigation.values() if isinstance(navigation, dict) else navigation:
            yield from leaves(entry)


def test_each_page_is_in_the_navigation_once() -> None:
    navigation = tomllib.loads((REPO / "zensical.toml").read_text())["project"]["nav"]
    pages = [file for folder in FOLDERS for file in (REPO / folder).rglob("*.md")]
    there = [str(page.relative_to(REPO)) for page in pages]
    assert sorted(leaves(navigation)) == sorted([*there, *(file for file in FILES if file.endswith(".md"))])


class Page(HTMLParser):
    """What an HTML page links to, what it loads, and the names of its headings."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links, self.loads, self.ids = set[str](), set[str](), set[str]()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value}
        self.ids |= {values["id"]} if "id" in values else set()
        self.links |= {values["href"]} if tag == "a" and "href" in values else set()
        self.loads |= {values[name] for name in ("src", "href") if name in values and tag != "a"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The pages of a copy of the repository, by their files."""
    pytest.importorskip("zensical")
    copy = tmp_path_factory.mktemp("repository")
    for name in FOLDERS:
        shutil.copytree(REPO / name, copy / name)
    for name in FILES:
        shutil.copy(REPO / name, copy)
    (copy / "ddpm").symlink_to(REPO / "ddpm")
    zensical = Path(sysconfig.get_path("scripts"), "zensical")
    built = run([sys.executable, zensical, "build", "--strict"], cwd=copy, env={"PYTHONPATH": "docs"})
    assert built.returncode == 0, built.stdout + built.stderr
    return {file: Page(file) for file in (copy / "build/pages").rglob("*.html") if file.name != "404.html"}


def test_links_lead_to_files_and_headings(pages: dict[Path, Page]) -> None:
    for file, page in pages.items():
        for link in page.links | page.loads:
            url = urlsplit(link)
            if url.scheme:
                continue
            target = (file.parent / unquote(url.path)).resolve() if url.path else file
            assert target.is_file(), (file.name, link)
            if url.fragment and target in pages:
                assert unquote(url.fragment) in pages[target].ids, (file.name, link)


def test_a_page_loads_nothing_from_the_network(pages: dict[Path, Page]) -> None:
    remote = {load for page in pages.values() for load in page.loads if urlsplit(load).netloc}
    assert remote == set()


def test_sources_are_named_not_linked(pages: dict[Path, Page]) -> None:
    text = {file.name: file.read_text() for file in pages}
    assert "<code>ddpm/training/loop.py</code>" in text["architecture.html"]
    assert "<code>examples/classifier/train_classifier.py</code>" in text["data.html"]


def test_the_api_has_parameters_and_errors(pages: dict[Path, Page]) -> None:
    api = {
        file.stem: (file.read_text(), page.ids) for file, page in pages.items() if file.parent.name == "api"
    }
    assert {"ddpm.api.train", "ddpm.api.Run.sample", "ddpm.build.TrainedNet"} <= api["python"][1]
    for module in (REPO / "ddpm/diffusion").glob("[!_]*.py"):
        assert f"ddpm.diffusion.{module.stem}" in api["diffusion"][1]
    text = re.sub(r"<[^>]+>|\s", "", api["ray"][0])
    assert "Raises:(CorruptData,StorageError)" in text and "broadcast(Callable" in text
    assert "Args:" not in "".join(text for text, _ in api.values())
