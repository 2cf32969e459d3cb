"""The params of a run in MLflow, what differs from a preset, and the versions that made it."""

import functools
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ddpm.build import resolve_sample
from ddpm.config import kinds, presets
from ddpm.config.json import flatten, keys_that_affect
from ddpm.config.tree import Affects, Config
from ddpm.utils.errors import UserError


def params(config: Config) -> dict[str, Any]:
    """The flat config without None, and without keys that have no effect on the images of this run."""
    resolve_sample(config.sample, config.objective)  # checks it
    flat = flatten(config)
    left_out = kinds.without_effect(flat)
    if config.model.num_classes == 0:
        left_out |= {"objective.label_dropout", "sample.guidance_scale", "sample.guidance_interval"}
    elif config.sample.guidance_scale == 1:
        left_out.add("sample.guidance_interval")
    keys = keys_that_affect(config, Affects.ANYTHING) - left_out
    return {key: value for key, value in flat.items() if value is not None and key in keys}


def check_effect(configs: Iterable[Config], given: Iterable[str], named: Callable[[str], str] = str) -> None:
    """Raise UserError if a setting of config.sample in `given` has no effect with any of `configs`.

    Args:
        named: makes a flag of the name of a setting.
    """
    effective = {key for config in configs for key in params(config)}
    for name in given:
        if f"sample.{name}" not in effective:
            raise UserError(f"{named(name)} has no effect here; ddpm sample --help says what it is for")


def flag(name: str) -> str:
    """The flag of a setting of config.sample."""
    return f"--{name.replace('_', '-')}"


def nearest_preset(config: Config) -> tuple[str, dict[str, Any]]:
    """The preset with the fewest differences from `config`, and these differences, without the locations of data."""
    flat = params(config)
    locations = keys_that_affect(config, Affects.LOCATION)
    compared = {key: value for key, value in flat.items() if key not in locations}
    changes = {}
    for name, preset in presets.PRESETS.items():
        known = flatten(preset)
        changes[name] = {key: value for key, value in compared.items() if value != known.get(key)}
    return min(changes.items(), key=lambda item: len(item[1]))


def changed_text(changed: Mapping[str, Any]) -> str:
    """Settings that differ from a preset as text: "optim.lr=0.001, train.seed=1", or "nothing"."""
    return ", ".join(f"{key}={value}" for key, value in changed.items()) or "nothing"


VERSION = "version.ddpm"
"""Key of `versions` for this package."""


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages, and the git commit if git tracks this file."""
    versions = {}
    for package, name in (("ddpm-on-ray", "ddpm"), ("torch", "torch"), ("ray", "ray")):
        with suppress(PackageNotFoundError):
            versions[f"version.{name}"] = version(package)
    with suppress(OSError, subprocess.SubprocessError):
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        described = _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        commit, _, dirty = described.partition("-")
        versions |= {"git.commit": commit, "git.dirty": str(bool(dirty)), "mlflow.source.git.commit": commit}
    return versions


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.check_output(command, text=True, timeout=10, stderr=subprocess.DEVNULL).strip()
