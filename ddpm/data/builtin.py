"""Data for a run that was given none: its preset's source, prepared beside the runs, once."""

from dataclasses import replace

from ddpm.checkpoints.runs import RESERVED
from ddpm.config import Config
from ddpm.data import prepare
from ddpm.data.glyphs import Glyphs
from ddpm.data.sources import Digits, FashionMnist, Source
from ddpm.data.torchvision import Torchvision
from ddpm.storage import locations
from ddpm.utils.errors import UserError
from ddpm.utils.progress import Display

PREPARE = {
    "fashion-mnist": ("fashion-mnist", "--path FOLDER"),
    "torchvision:cifar10": ("torchvision", "--dataset cifar10 --root FOLDER"),
    "torchvision:celeba": ("torchvision", "--dataset celeba --root FOLDER"),
}
"""For sources of files that may lie elsewhere: what jobs/prepare.py is told."""


def with_shards(config: Config, command: str = "the same command") -> Config:
    """`config` with data.shards: what was given, or config.data.source, prepared to {run.storage}/data/.

    Args:
        command: what to type again once the source's files are prepared.

    Raises:
        UserError: there is neither, or the source's files are missing.
    """
    if config.data.shards is not None:
        return replace(config, data=replace(config.data, shards=locations.absolute(config.data.shards)))
    try:
        source = _source(config.data.source)
    except UserError as error:
        if config.data.source not in PREPARE:
            raise
        name, flags = PREPARE[config.data.source]
        shards = f"shards/{config.data.source.rpartition(':')[2]}"
        raise UserError(
            f"{error}: `python jobs/prepare.py {name} {shards} {flags}`, then `{command} --data.shards {shards}`"
        ) from None
    # With a digest in its name: what another version has prepared stays as it is, beside it.
    name = f"{config.data.source}-{prepare.options_of(source)[:8]}".replace(":", "-")
    place = locations.resolve(config.run.storage).child(RESERVED).child(name)
    if not prepare.find(source, place.filesystem, place.path, place.uri):
        with Display(f"preparing {config.data.source}", sum(source.splits.values())) as display:
            prepare.prepare(
                source,
                place.filesystem,
                place.path,
                where=place.uri,
                on_progress=lambda done, total: display.update(done),
            )
    return replace(config, data=replace(config.data, shards=place.uri))


def _source(name: str | None) -> Source:
    """The source that a preset names."""
    match name:
        case "digits":
            return Digits()
        case "glyphs":
            return Glyphs()
        case "fashion-mnist":
            return FashionMnist()
        case "torchvision:cifar10":
            return Torchvision("cifar10")
        case "torchvision:celeba":
            return Torchvision("celeba")
    raise UserError(
        f"data.source is {name!r}, which is not built in; make a data set with `python jobs/prepare.py SOURCE URI`, "
        "and give it as --data.shards URI"
    )
