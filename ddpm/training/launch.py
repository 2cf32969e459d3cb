"""Training from a preset's arguments to the end: the data are prepared, the run is named, and `fit` trains it.

PyTorch and Ray are imported where they are needed, since that takes seconds: a mistake is an error at once.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ddpm.config.presets import PresetArguments
from ddpm.config.tree import Config
from ddpm.data import plan
from ddpm.runs import settings
from ddpm.utils import command_line

if TYPE_CHECKING:
    from ddpm.training.fit import Result


def checked(arguments: PresetArguments) -> Config:
    """The config that `launch` would train, checked; its run has a name unless that depends on the data."""
    plan.check_batches(arguments.config)

    from ddpm.runs import run_folder
    from ddpm.training import loop

    loop.check(arguments.config)
    config = run_folder.with_storage(arguments.config)
    preset = arguments.base or config
    if settings.has_own_data(config, preset):
        config = _named(config, arguments.preset, preset, settings.differences(config, preset))
    return config


def launch(arguments: PresetArguments, items: Any = None) -> "Result":
    """Train or resume the run of `arguments`, and print how it goes.

    Args:
        items: a data set in Python, in place of the config's.
    """
    began = time.monotonic()
    plan.check_batches(arguments.config)

    from ddpm.training import loop

    loop.check(arguments.config)

    from ddpm.cluster import job_folder, ray_init
    from ddpm.data import latents, prepare_for_run, ray_stream, sorted_labels
    from ddpm.runs import run_folder

    job_folder.set_home(arguments.verbose)
    config = run_folder.with_storage(arguments.config)
    preset = arguments.base or arguments.config
    run_folder.check_writable(config)
    has_own_data = items is None and settings.has_own_data(config, preset)
    connect = partial(ray_init.connect, arguments.verbose)
    config = prepare_for_run.prepared(config, command_line.typed(), connect, items)
    data_set = ray_stream.open_configured(config)
    config = latents.configured(config, data_set.manifest, data_set.location.uri)
    print(f"data        {config.data.shards}  ({data_set.rows.num_rows:,} images to train on)")
    if warning := sorted_labels.warning(data_set, config.data.window_rows):
        print(f"warning: {warning}", file=sys.stderr)
    changed = settings.differences(config, preset, "" if has_own_data else data_set.rows.fingerprint)
    is_named = config.run.name is not None
    config = _named(config, arguments.preset, preset, changed)
    print(f"run         {config.run.storage}/{config.run.name}")
    connect()
    from ddpm.training.fit import Origin, fit, summary  # imported while Ray starts

    origin = Origin(arguments.preset, changed, is_named)
    result = fit(config, data_set, origin, verbose=arguments.verbose)
    _print_end(result, config, preset, time.monotonic() - began)
    for line in summary(result):
        print(line)
    return result


def _named(config: Config, preset: str, base: Config, changed: Mapping[str, Any]) -> Config:
    """`config` with a name for its run, if it has none: its preset's, and a hash of what differs from it."""
    if config.run.name is not None:
        return config
    name = settings.run_name(preset, base.data.images, changed)
    return replace(config, run=replace(config.run, name=name))


def _print_end(result: "Result", config: Config, preset: Config, seconds: float) -> None:
    """Print how the run ended."""
    from ddpm.runs import checkpoint

    if result.was_finished:
        print(f"run {config.run.name} is finished: {result.images_seen:,} images seen; nothing left to do")
        assert result.checkpoint is not None, "a finished run has one"
        trained = checkpoint.config_at(result.checkpoint)
        if flags := settings.flags_without_effect(config, preset, trained):
            print(f"no effect   {', '.join(flags)}")
    elif result.signal:
        effect = "resumes it" if result.checkpoint else "starts it again"
        print(f"stopped     at {result.images_seen:,} images; the same command {effect}")
    else:
        print(f"trained     {result.images_seen:,} images, done after {seconds:.0f} s")
