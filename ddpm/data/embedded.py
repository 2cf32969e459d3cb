"""Data for runs that were given none: prepared beside the runs, once."""

from dataclasses import replace

from ddpm import storage
from ddpm.config import Config, UserError
from ddpm.progress import Display
from ddpm.runs import RESERVED


def with_shards(config: Config) -> Config:
    """`config` with data.shards: what was given, or the preset's source, prepared to {run.storage}/data/.

    Raises:
        UserError: there is neither, or the source's files are missing.
    """
    if config.data.shards is not None:
        return replace(config, data=replace(config.data, shards=storage.absolute(config.data.shards)))
    if config.data.source is None:
        raise UserError(
            "this preset has no data of its own: make a data set with `python jobs/prepare.py SOURCE URI` "
            "(see its --help for sources), and give it as --data.shards URI"
        )
    from ddpm.data import prepare, sources

    source = sources.build(config.data.source)
    location = storage.resolve(config.run.storage).child(RESERVED).child(config.data.source)
    with Display("preparing", sum(source.splits.values())) as display:
        prepare.prepare(source, location, on_progress=lambda done, total: display.update(done))
    return replace(config, data=replace(config.data, shards=location.uri))
