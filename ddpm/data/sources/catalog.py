"""The source that a configuration names (ddpm/config/kinds.py)."""

import inspect

from ddpm.config import kinds
from ddpm.data.sources.sources import Source
from ddpm.utils.errors import UserError


def named(name: str | None) -> Source:
    """The source for data.source: NAME with default options, or torchvision:DATASET."""
    if name is None:
        raise UserError("no images are given: --data.images FOLDER, or a data set as --data.shards URI")
    key, _, dataset = name.partition(":")
    options = {"dataset": dataset} if dataset else {}
    kind = kinds.find("data.source", key).load()
    try:
        inspect.signature(kind).bind(**options)
    except TypeError:
        raise UserError(
            f"data.source is {name!r}, and {key} needs other options; make a data set with `ddpm prepare "
            f"{key} URI`, and give it as --data.shards URI"
        ) from None
    source: Source = kind(**options)
    return source
