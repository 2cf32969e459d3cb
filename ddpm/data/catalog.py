"""The sources by name: built-in ones, and plugins of installed packages (group ddpm.sources)."""

import inspect
from typing import Any

from ddpm.data.huggingface import HuggingFace
from ddpm.data.image_folder import Folder
from ddpm.data.sources import Digits, FashionMnist, Source
from ddpm.data.torchvision import Torchvision
from ddpm.utils import plugins
from ddpm.utils.errors import UserError

GROUP = "ddpm.sources"
SOURCES: dict[str, type[Any]] = {
    "digits": Digits,
    "fashion-mnist": FashionMnist,
    "folder": Folder,
    "torchvision": Torchvision,
    "parquet": HuggingFace,
}
"""Each is a frozen dataclass of a source's options; its docstrings are the help of jobs/prepare.py."""


def names() -> list[str]:
    """The names of all sources."""
    return list(dict.fromkeys([*SOURCES, *plugins.names(GROUP)]))


def kind_of(name: str) -> Any:
    """The source called `name`, None: there is none; a plugin cannot replace a built-in one."""
    return SOURCES.get(name) or plugins.load(GROUP, name)


def named(name: str | None) -> Source:
    """The source for data.source: NAME with default options, or torchvision:DATASET."""
    if name is None:
        raise UserError("no images are given: --data.images FOLDER, or a data set as --data.shards URI")
    key, _, dataset = name.partition(":")
    kind, options = kind_of(key), {"dataset": dataset} if dataset else {}
    try:
        inspect.signature(kind).bind(**options)
    except TypeError:  # no source has this name, or it needs options
        raise UserError(
            f"data.source is {name!r}, which is not built in; make a data set with `python jobs/prepare.py SOURCE "
            "URI`, and give it as --data.shards URI"
        ) from None
    source: Source = kind(**options)
    return source
