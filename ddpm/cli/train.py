"""Train a preset: ddpm train PRESET [--name N] [--data URI | --data.images FOLDER] [--storage URI] ...

The same command resumes its run. Without --name a run is named by its preset, and by what differs from it.
`ddpm train PRESET --help` lists common flags, `--help-all` every flag.
"""

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ddpm.cli import parsing
from ddpm.config.json import flatten
from ddpm.config.presets import PresetArguments
from ddpm.config.tree import Config
from ddpm.data.sources import folder_preset
from ddpm.utils import command_line


@dataclass(frozen=True)
class TrainArguments(PresetArguments):
    """A preset and its changes, and whether to train."""

    dry_run: bool = False
    """Print the size of training and the configuration; start nothing."""


def main() -> int:
    arguments: TrainArguments = parsing.parse_preset(TrainArguments, __doc__, folder_preset.preset)
    if arguments.dry_run:
        return show(arguments)
    result = launch(arguments)
    return 128 + result.signal if result.signal else 0


def show(arguments: PresetArguments) -> int:
    """Print what training takes, and the configuration, a key a line; returns the exit code."""
    from ddpm.data import plan

    plan.check_batches(arguments.config)

    from ddpm.runs import run_folder, settings
    from ddpm.training import footprint, loop

    loop.check(arguments.config)
    config = run_folder.with_storage(arguments.config)
    preset = arguments.base or arguments.config
    if config.run.name is None and settings.has_own_data(config, preset):
        changed = settings.differences(config, preset)
        name = settings.run_name(arguments.preset, preset.data.images, changed)
        config = replace(config, run=replace(config.run, name=name))
    print(f"net         {footprint.footprint(config)}")
    for key, value in flatten(config).items():
        print(f"{key} = {value}")
    return 0


def launch(arguments: PresetArguments, items: Any = None) -> Any:
    """Train, with `items`, a data set in Python, in place of the config's; returns a `fit.Result`."""
    from ddpm.data import plan  # after parsing, so that --help and errors come at once

    began = time.monotonic()
    plan.check_batches(arguments.config)

    from ddpm.training import loop  # seconds: PyTorch

    loop.check(arguments.config)

    from ddpm.cluster import job_folder, ray_init
    from ddpm.data import prepare_for_run, ray_stream, sorted_labels
    from ddpm.runs import run_folder, settings  # seconds: Ray

    job_folder.set_home(arguments.verbose)
    config = run_folder.with_storage(arguments.config)
    preset = arguments.base or arguments.config
    run_folder.check_writable(config)
    has_own_data = items is None and settings.has_own_data(config, preset)
    connect = partial(ray_init.connect, arguments.verbose)
    config = prepare_for_run.prepared(config, command_line.typed(), connect, items)
    data_set = ray_stream.open_configured(config)
    print(f"data        {config.data.shards}  ({data_set.rows.num_rows:,} images to train on)")
    if warning := sorted_labels.warning(data_set, config.data.window_rows):
        print(f"warning: {warning}", file=sys.stderr)
    changed = settings.differences(config, preset, "" if has_own_data else data_set.rows.fingerprint)
    is_named = config.run.name is not None
    if not is_named:
        name = settings.run_name(arguments.preset, preset.data.images, changed)
        config = replace(config, run=replace(config.run, name=name))
    print(f"run         {config.run.storage}/{config.run.name}")
    connect()
    from ddpm.training.fit import Origin, fit, summary  # imported while Ray starts

    origin = Origin(arguments.preset, changed, is_named)
    result = fit(config, data_set, origin, verbose=arguments.verbose)
    _print(result, config, preset, time.monotonic() - began)
    for line in summary(result):
        print(line)
    return result


def _print(result: Any, config: Config, preset: Config, seconds: float) -> None:
    """Print how the run ended."""
    from ddpm.runs import checkpoint, settings

    if result.was_finished:
        print(f"run {config.run.name} is finished: {result.images_seen:,} images seen; nothing left to do")
        assert result.checkpoint is not None, "a finished run has one"
        trained = checkpoint.config_at(result.checkpoint)
        if in_vain := settings.typed_in_vain(config, preset, trained):
            print(f"no effect   {', '.join(in_vain)}")
    elif result.signal:
        effect = "resumes it" if result.checkpoint else "starts it again"
        print(f"stopped     at {result.images_seen:,} images; the same command {effect}")
    else:
        print(f"trained     {result.images_seen:,} images, done after {seconds:.0f} s")
