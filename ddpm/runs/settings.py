"""What makes a run this run: the settings in which it differs from its preset. The same command is the same run."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm.config.json import flatten, keys_that_affect
from ddpm.config.tree import Affects, Config
from ddpm.utils.errors import UserError

DATA = "data"
"""Key for the fingerprint of data that are not the preset's own."""
LENGTH = "train.total_images"
"""It is a run's own, too: the learning rate falls with it."""
PATHS = ("data.images", "data.shards")
OF_DATA = ("data.x_0_max",)
"""Settings that follow from the data set, whose fingerprint or autoencoder is part of a run."""
DIGITS = 8
MAX_NAME = 60
"""Characters of a folder's name in the name of its run."""


def differences(config: Config, preset: Config, data_fingerprint: str = "") -> dict[str, Any]:
    """The settings of `config` that are not those of `preset`, by dotted key, sorted.

    They are all that affects the weights or the task, and the length. Paths, workers, storage, sampling and intervals
    are not among them.

    Args:
        data_fingerprint: of data that are not the preset's own; empty: they are.
    """
    keys = keys_that_affect(config, Affects.WEIGHTS | Affects.TASK) | {LENGTH}
    now = flatten(config)
    before = flatten(preset)
    changed = {key: now[key] for key in keys if key not in PATHS + OF_DATA and now[key] != before.get(key)}
    if data_fingerprint:
        changed[DATA] = data_fingerprint
    return dict(sorted(json.loads(json.dumps(changed)).items()))


def has_own_data(config: Config, preset: Config) -> bool:
    """Whether `config`, before its data are prepared, trains on the data of its preset."""
    ours = preset.data
    given = config.data
    return (given.shards, given.images, given.source) == (ours.shards, ours.images, ours.source)


def run_name(preset: str, folder: str | None, changed: Mapping[str, Any]) -> str:
    """The name of a run without --run.name: its preset, and a hash of what differs from it.

    Args:
        folder: the folder of images that the preset was derived from; None: none.
    """
    name = preset
    if folder is not None:
        name += "-" + (re.sub(r"[^\w.-]+", "-", Path(folder).resolve().name)[:MAX_NAME] or "pictures")
    if changed:
        name += "-" + hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:DIGITS]
    return name


def check_same(began: Mapping[str, Any], now: Mapping[str, Any], where: str, version: str) -> None:
    """Raise UserError unless a run that began with the differences `began` is the one of this command.

    Args:
        where: the run's folder.
        version: the version of this package that made it.
    """
    differing = [key for key in sorted({**began, **now}) if began.get(key) != now.get(key)]
    if differing:
        listed = ", ".join(f"{key} {_shown(began, key)} (now {_shown(now, key)})" for key in differing[:4])
        raise UserError(
            f"{where} is another run, made by version {version or 'unknown'}: {listed}; give this one a name, "
            "--run.name NAME"
        )


def _shown(changed: Mapping[str, Any], key: str) -> str:
    return str(changed[key]) if key in changed else "as in the preset"


def flags_without_effect(config: Config, preset: Config, trained: Config) -> list[str]:
    """The flags of `config` that differ from a finished run's config, `trained`: they have no effect any more."""
    now = flatten(config)
    before = flatten(preset)
    have = flatten(trained)
    elsewhere = (*PATHS, "data.source", "run.name", "run.storage")
    chosen = [key for key in now if key not in elsewhere and now[key] != before.get(key)]
    return [f"--{key.replace('_', '-')} {now[key]}" for key in chosen if now[key] != have.get(key)]
