"""Data for a run that was given none: its preset's source, prepared beside the runs, once."""

from dataclasses import replace

from ddpm.checkpoints.runs import RESERVED
from ddpm.config import Config
from ddpm.data import catalog, prepare
from ddpm.data.sources import MissingFiles
from ddpm.storage import locations
from ddpm.utils.errors import UserError
from ddpm.utils.progress import Display


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
        source = catalog.named(config.data.source)
    except MissingFiles as error:
        kind, _, dataset = str(config.data.source).partition(":")
        shards = f"shards/{dataset or kind}"
        raise UserError(
            f"{error}: `python jobs/prepare.py {kind} {shards} {error.flags}`, then `{command} --data.shards {shards}`"
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
