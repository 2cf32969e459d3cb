"""Train a preset: python jobs/train.py PRESET [--data.shards URI] [--run.name N] [--run.storage URI] ...

Typing the same command again, with the same --run.name, goes on where the run stopped.
`python jobs/train.py PRESET --help` lists every flag.
"""

import time
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from ddpm import cli, presets
from ddpm.config import Config


@dataclass(frozen=True)
class Arguments:
    """A preset and what is changed in it."""

    preset: tyro.conf.Suppress[str]
    config: Annotated[Config, tyro.conf.arg(name="")]
    verbose: bool = False
    """Show Ray's own messages, and tracebacks."""


def main() -> None:
    defaults = {name: Arguments(name, config) for name, config in presets.PRESETS.items()}
    arguments = tyro.cli(
        tyro.extras.subcommand_type_from_defaults(defaults, presets.ABOUT), description=__doc__
    )
    from ddpm.data.embedded import prepare as embedded

    from ddpm import runs, storage  # after parsing: --help and mistakes answer at once
    from ddpm.data import stream
    from ddpm.training import cluster, loop

    began, config = time.monotonic(), arguments.config
    name = config.run.name or runs.default_name(arguments.preset)
    uri = storage.absolute(config.run.storage)
    config = replace(config, run=replace(config.run, name=name, storage=uri))
    loop.check(config, config.cluster.num_workers)
    cluster.connect(arguments.verbose)
    shards = storage.absolute(config.data.shards or embedded(config))
    config = replace(config, data=replace(config.data, shards=shards))
    data_set = stream.open_data_set(shards, config.data.split)
    print(f"data        {shards}  ({data_set.rows.num_rows:,} images to train on)")
    result = cluster.fit(config, data_set, runs.open_run(name, uri), verbose=arguments.verbose)
    if result.was_finished:
        print(f"run {name} is finished: {result.images_seen:,} images seen; nothing left to do")
    else:
        print(f"trained     {result.images_seen:,} images, done after {time.monotonic() - began:.0f} s")
    for line in cluster.summary(result):
        print(line)


if __name__ == "__main__":
    cli.run(main)
