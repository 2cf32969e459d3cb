"""The data of a run without data.shards: its source, a folder of images, or items, prepared once beside the runs."""

import inspect
import logging
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from ddpm.config import kinds
from ddpm.config.tree import Config
from ddpm.data import duplicates, prepare
from ddpm.data.manifest import Manifest, read_manifest
from ddpm.data.sources.image_folder import Folder
from ddpm.data.sources.items import Items
from ddpm.data.sources.sources import LEAST_HELD_OUT, MissingFiles, Source
from ddpm.latents import autoencoder
from ddpm.runs import storage
from ddpm.runs.run_folder import RESERVED
from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError
from ddpm.utils.progress import printable

log = logging.getLogger(__name__)

MAX_NAME = 60
"""Characters of a folder's name in the name of its data set; a folder's name has at most 255 bytes."""
REPORTING = "ddpm-duplicates"
"""The name of the thread that reports near-duplicates."""
NUM_LISTED = 4
"""Classes that a line names."""


def prepared(
    config: Config,
    command: str = "the same command",
    connect: Callable[[], None] | None = None,
    items: Any = None,
) -> Config:
    """Prepare the data of a run, which takes minutes if there are many images, and return the config with data.shards.

    The data are `items`, or else data.shards, which are ready, or data.images, or data.source. The data set is written
    to {run.storage}/data/, unless it is there already.

    Args:
        command: the command to repeat once the source's files are prepared.
        connect: starts Ray, which takes seconds: before many images are prepared, for its workers to do that, or while
            fewer are prepared. Not called if nothing is prepared.
    """
    if items is None and config.data.shards is not None:
        if config.data.images is not None:
            raise UserError("--data.images and --data are two data sets; give one of them")
        return replace(config, data=replace(config.data, shards=storage.absolute(config.data.shards)))
    size = config.data.image_size or config.model.image_size
    channels = 3 if config.data.autoencoder else config.model.channels
    if (config.data.images is not None or items is not None) and channels not in (1, 3):
        raise UserError(f"images have 1 channel (grey) or 3 (colour), but model.channels is {channels}")
    name: str
    source: Source
    if items is not None:
        name = "items"
        source = Items(items, size, channels)
    elif config.data.images is not None:
        name, source = _folder(config, size, cast(Literal[1, 3], channels))
    else:
        name, source = _named(config, command)
    # With a digest in its name, the data set of other options or other images is another folder.
    options = prepare.options_of(source)
    folder = f"{name}-{options[:8]}".replace(":", "-")
    location = storage.resolve(config.run.storage).child(RESERVED).child(folder)
    if prepare.find(location, options) is None:
        _prepare(config, name, source, location, connect)
    if line := prepare.left_out(location):
        print(line, flush=True)
    if config.data.autoencoder is not None:
        location = _encoded(config, name, location, connect)
    data = replace(config.data, shards=location.uri)
    if items is not None or config.data.images is not None:
        data = replace(data, images=None, source=None)  # the shards are not of the preset's source
    return replace(config, data=data)


def _encoded(config: Config, name: str, pixels: Location, connect: Callable[[], None] | None) -> Location:
    """The data set of the latents of the images at `pixels`, encoded once."""
    from ddpm.data import encode  # PyTorch

    kind = str(config.data.autoencoder).partition(":")[0]
    loaded = autoencoder.load(str(config.data.autoencoder))
    images = read_manifest(pixels)
    options = encode.options_of(images, loaded, mirror=False)
    location = pixels.beside(f"{name}-{kind}-{options[:8]}".replace(":", "-"))
    manifest = prepare.find(location, options)
    if manifest is None:
        if connect is not None:
            connect()
        manifest = encode.encode(pixels, images, location, loaded, kind)
    print(encode.about(manifest)[-3])
    return location


def _prepare(
    config: Config, name: str, source: Source, location: Location, connect: Callable[[], None] | None
) -> None:
    """Prepare `source` at `location`, and report what a folder of images holds."""
    write = partial(
        prepare.prepare,
        source,
        location,
        description=f"preparing {name}",
        skip_unreadable=config.data.skip_unreadable,
    )
    if connect is None:
        manifest = write()
    elif prepare.is_large(source) and not isinstance(source, Items) and "RAY_ADDRESS" not in os.environ:
        # On this machine alone: other nodes may not see the folder, and items stay in this process.
        manifest = write(connect=connect)
    else:
        preparing = _in_background(write)
        connect()
        manifest = preparing.result()
    if isinstance(source, Folder) and connect is None:
        _report_duplicates(source, location, manifest)
    elif isinstance(source, Folder):  # while workers start
        arguments = (source, location, manifest, False)
        threading.Thread(target=_report_duplicates, args=arguments, name=REPORTING).start()


def _in_background(function: Callable[[], Manifest]) -> Future[Manifest]:
    """Call `function` in a thread that the process does not wait for when it exits, such as after Ctrl-C."""
    future = Future[Manifest]()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _report_duplicates(
    source: Folder, location: Location, manifest: Manifest, shows_progress: bool = True
) -> None:
    """Report near-duplicates; training does not depend on it."""
    try:
        for line in duplicates.report(source, location, manifest, shows_progress=shows_progress):
            print(line, flush=True)
    except UserError as error:
        log.warning("%s", error)


def source_named(name: str | None) -> Source:
    """The source for data.source: NAME with default options, or torchvision:DATASET."""
    if name is None:
        raise UserError("no images are given: --data.images FOLDER, or a data set as --data URI")
    key, _, dataset = name.partition(":")
    options = {"dataset": dataset} if dataset else {}
    kind = kinds.find("data.source", key).load()
    try:
        inspect.signature(kind).bind(**options)
    except TypeError:
        raise UserError(
            f"data.source is {name!r}, and {key} needs other options; make a data set with `ddpm prepare "
            f"{key} URI`, and give it as --data URI"
        ) from None
    source: Source = kind(**options)
    return source


def _named(config: Config, command: str) -> tuple[str, Source]:
    """Name and source for data.source."""
    name = config.data.source
    try:
        return str(name), source_named(name)
    except MissingFiles as error:
        kind, _, dataset = str(name).partition(":")
        shards = f"shards/{dataset or kind}"
        raise UserError(
            f"{error}: `ddpm prepare {kind} {shards} {error.flags}`, then `{command} --data {shards}`"
        ) from None


def _folder(config: Config, size: int, channels: Literal[1, 3]) -> tuple[str, Source]:
    """Name and source for the folder data.images, at that size."""
    folder = Path(str(config.data.images))
    if not folder.is_dir():
        raise UserError(
            f"--data.images {config.data.images} is not a folder on this machine; name a folder of images"
        )
    source = Folder(folder, size, channels)
    if config.run.tracking == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
        # MLflow's files go to the working folder.
        prepare.check_outside(source, Path(storage.absolute(".")))
    colours = "grey" if channels == 1 else "colour"
    shown = f"{printable(str(folder))}, as {size}x{size} {colours}"
    flags = "--size" if config.data.autoencoder else "--model.image-size, --model.channels"
    print(f"images      {shown} ({flags})", flush=True)
    if config.data.augment:
        print(f"augmented   with probability {config.data.augment:g} (--data.augment)", flush=True)
    if source.skipped:
        print(f"skipped     {source.skipped}", flush=True)
    if source.class_names:
        print(f"labels      {_about_labels(source.class_names, config.model.num_classes)}", flush=True)
    num_held_out = source.splits["test"]
    if num_held_out < LEAST_HELD_OUT:
        print(
            f"held out    {num_held_out}; ddpm evaluate needs {LEAST_HELD_OUT}, as of 100 images or more",
            flush=True,
        )
    name = re.sub(r"[^\w.-]+", "-", folder.resolve().name)[:MAX_NAME]
    return name or "pictures", source


def _about_labels(class_names: tuple[str, ...], num_classes: int) -> str:
    """What the subfolders mean for a net of `num_classes` classes, for the user."""
    listed = printable(", ".join(class_names[:NUM_LISTED]))
    if len(class_names) > NUM_LISTED:
        listed += ", ..."
    if num_classes:
        return f"{len(class_names)} classes, the subfolders {listed} (--model.num-classes 0 for none)"
    if len(class_names) == 1:
        return f"none: all images are in one subfolder, {listed}"
    return f"none (--model.num-classes {len(class_names)} for those of the subfolders {listed})"
