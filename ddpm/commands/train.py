"""Train a preset: python jobs/train.py PRESET [--name N] [--data URI | --data.images FOLDER] [--storage URI] ...

Run the same command again, with the same --name, to resume the run. `python jobs/train.py PRESET --help` lists the
flags that people change first, `--help-all` every flag.
"""

import shlex
import time
from functools import partial
from typing import Any

from ddpm import cli
from ddpm.cli import PresetArguments
from ddpm.commands import folder
from ddpm.utils import command_line


def main() -> int:
    result = launch(cli.parse_preset(PresetArguments, __doc__, folder.preset))
    return 128 + result.signal if result.signal else 0


def launch(arguments: PresetArguments, items: Any = None) -> Any:
    """Train, with `items`, a data set in Python, in place of the config's; returns a `fit.Result`."""
    from ddpm.data import plan  # after parsing, so that --help and errors come at once

    began = time.monotonic()
    plan.check_batches(arguments.config)

    from ddpm.training import loop  # seconds: PyTorch

    loop.check(arguments.config)

    from ddpm.checkpoints import runs  # seconds: Ray
    from ddpm.cluster import package, ray_init
    from ddpm.data import builtin, ray_dataset

    package.leave(arguments.verbose)
    config = runs.with_name_and_storage(arguments.config, arguments.preset)
    connect = partial(ray_init.connect, arguments.verbose)
    config = builtin.with_shards(config, command_line.typed(), connect, items)
    data_set = ray_dataset.open_configured(config)
    print(f"data        {config.data.shards}  ({data_set.rows.num_rows:,} images to train on)")
    connect()
    from ddpm.training.fit import fit, summary  # imported while Ray starts

    result = fit(config, data_set, verbose=arguments.verbose)
    took = f"done after {time.monotonic() - began:.0f} s"
    if result.was_finished:
        print(f"run {config.run.name} is finished: {result.images_seen:,} images seen; nothing left to do")
    elif result.signal:
        name, effect = shlex.quote(result.run.name), "resume" if result.checkpoint else "start over"
        again = f"run the same command again with --run.name {name} to {effect}"
        print(f"stopped     at {result.images_seen:,} images; {again}")
    else:
        print(f"trained     {result.images_seen:,} images, {took}")
    for line in summary(result):
        print(command_line.installed(line))
    return result
