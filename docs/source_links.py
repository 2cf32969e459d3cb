"""Markdown extension of `make docs`: a link to a file that is not on the pages becomes its path, as code.

The pages have Markdown, pictures and notebooks. Programs and settings are in the repository, which has no address.
"""

import posixpath
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from zensical.extensions.context import ContextPreprocessor

ON_THE_PAGES = (".md", ".ipynb", ".png", ".gif", ".svg")


class SourceLinks(Extension):
    """Registers PathsAsCode after the treeprocessor that makes the links, whose priority is 20."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.treeprocessors.register(PathsAsCode(md), "source_links", 15)


class PathsAsCode(Treeprocessor):
    """Replaces the links of one page."""

    def run(self, root: Element) -> None:
        context = ContextPreprocessor.from_markdown(self.md)
        assert context, "Zensical registers it"
        folder = posixpath.dirname(context.page.path)
        for link in root.iter("a"):
            url = urlsplit(link.get("href", ""))
            if url.scheme or not url.path or url.path.endswith(ON_THE_PAGES):
                continue
            tail = link.tail
            link.clear()
            link.tag = "code"
            link.tail = tail
            link.text = posixpath.normpath(posixpath.join(folder, url.path))
