"""Data for a run without data.shards: its preset's source, images or items, prepared once beside the runs."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from ddpm.checkpoints.runs import RESERVED
from ddpm.config import Config
from ddpm.data import catalog, duplicates, prepare
from ddpm.data.image_folder import Folder
from ddpm.data.items import Items
from ddpm.data.sources import MissingFiles, Source
from ddpm.storage import locations
from ddpm.utils.errors import UserError
from ddpm.utils.progress import printable

MAX_NAME = 60
"""Characters of a folder's name in the name of its data set; a folder's name has at most 255 bytes."""


def with_shards(
    config: Config,
    command: str = "the same command",
    connect: Callable[[], None] | None = None,
    items: Any = None,
) -> Config:
    """`config` with data.shards: the given one, or items, data.images or data.source, prepared in {run.storage}/data/.

    Args:
        command: the command to repeat once the source's files are prepared.
        connect: starts Ray to prepare many images on workers; not called if these may not see the folder.
    """
    if items is None and config.data.shards is not None:
        if config.data.images is not None:
            raise UserError("--data.images and --data.shards are two data sets; give one of them")
        return replace(config, data=replace(config.data, shards=locations.absolute(config.data.shards)))
    what: str = "items"
    source: Source = Items(items, config.model.image_size, config.model.channels)
    if items is None:
        what, source = _pictures(config) if config.data.images is not None else _named(config, command)
    # The name has a digest, so data sets of other versions or other images are kept beside this one.
    name = f"{what}-{prepare.options_of(source)[:8]}".replace(":", "-")
    location = locations.resolve(config.run.storage).child(RESERVED).child(name)
    if items is not None or "RAY_ADDRESS" in os.environ or not prepare.is_large(source):
        connect = None
    skip = config.data.skip_unreadable
    is_new = prepare.find(source, location) is None
    manifest = prepare.prepare(source, location, f"preparing {what}", connect=connect, skip_unreadable=skip)
    if is_new and isinstance(source, Folder):
        print(f"files       {source.statistics()}")
        for line in duplicates.report(source, location, manifest):
            print(line, flush=True)
    if items is not None or config.data.images is not None:  # the shards are not of the preset's source
        config = replace(config, data=replace(config.data, images=None, source=None))
    return replace(config, data=replace(config.data, shards=location.uri))


def _named(config: Config, command: str) -> tuple[str, Source]:
    """Name and source for data.source."""
    try:
        return str(config.data.source), catalog.named(config.data.source)
    except MissingFiles as error:
        kind, _, dataset = str(config.data.source).partition(":")
        shards = f"shards/{dataset or kind}"
        raise UserError(
            f"{error}: `python jobs/prepare.py {kind} {shards} {error.flags}`, then `{command} --data.shards {shards}`"
        ) from None


def _pictures(config: Config) -> tuple[str, Source]:
    """Name and source for the folder data.images, at the net's image size."""
    folder, net = Path(str(config.data.images)), config.model
    if not folder.is_dir():
        raise UserError(
            f"--data.images {config.data.images} is not a folder on this machine; name a folder of images"
        )
    if net.channels not in (1, 3):
        raise UserError(
            f"--data.images: images have 1 channel (grey) or 3 (colour), but model.channels is {net.channels}"
        )
    source = Folder(folder, net.image_size, cast(Literal[1, 3], net.channels))
    if "MLFLOW_TRACKING_URI" not in os.environ:  # its files go to the working folder
        prepare.check_outside(source, Path(locations.absolute(".")))
    kind = f"{net.image_size}x{net.image_size} {'grey' if net.channels == 1 else 'colour'}"
    what = f"{printable(str(folder))}, as {kind}"
    print(f"images      {what} (--model.image-size, --model.channels)", flush=True)
    if config.data.augment:
        print(f"augmented   with probability {config.data.augment:g} (--data.augment)", flush=True)
    if source.skipped:
        print(f"skipped     {source.skipped}", flush=True)
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name)[:MAX_NAME] or "pictures", source
