"""The params of a run in MLflow, what differs from a preset, and the versions that made it."""

import functools
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ddpm import presets
from ddpm.build import resolve_sample
from ddpm.config import Affects, Config
from ddpm.config_io import flatten, keys_that_affect
from ddpm.diffusion.objectives import PROCESSES
from ddpm.diffusion.schedules import SCHEDULES
from ddpm.utils.errors import UserError


def params(config: Config) -> dict[str, Any]:
    """The flat config without None, and without keys that have no effect on the images of this run."""
    objective, has_labels = config.objective, config.model.num_classes > 0
    process, draws_sigma = PROCESSES[objective.process], objective.timesteps != "uniform"
    uses_time, weights = process.uses_time, objective.weight if process.has_bound else ""
    sample = resolve_sample(config.sample, objective)
    is_ddpm, spacing = sample.sampler == "ddpm", sample.spacing
    by_default = ("auto", "dpmpp_2m"), ("auto", "heun")
    is_karras = uses_time and (spacing == "karras" or (spacing, sample.sampler) in by_default)
    schedule = {"kind", "num_timesteps", *SCHEDULES[config.schedule.kind][1]} if uses_time else set()
    has_effect = {
        **{f"schedule.{name}": name in schedule for name in flatten(config.schedule)},
        **dict.fromkeys((f"objective.{name}" for name in ("predict", "variance", "timesteps")), uses_time),
        "objective.weight": weights != "",
        "objective.sigma_data": uses_time and "edm" in (objective.predict, weights),
        "objective.min_snr_gamma": weights == "min_snr",
        **dict.fromkeys(("objective.log_sigma_mean", "objective.log_sigma_std"), uses_time and draws_sigma),
        "objective.label_dropout": has_labels,
        "sample.guidance_scale": has_labels,
        "sample.guidance_interval": has_labels and sample.guidance_scale != 1,
        **dict.fromkeys(("sample.rho", "sample.sigma_min"), is_karras),
        "sample.spacing": uses_time,
        "sample.eta": sample.sampler in ("ddim", "dpmpp_2m"),
        "sample.mean": is_ddpm,
        "sample.variance": is_ddpm,
        "sample.clip_x_0": not is_ddpm,
    }
    keys = keys_that_affect(config, Affects.ANYTHING)
    return {
        key: value
        for key, value in flatten(config).items()
        if value is not None and has_effect.get(key, key in keys)
    }


def check_effect(configs: Iterable[Config], given: Iterable[str], named: Callable[[str], str] = str) -> None:
    """Raise UserError if a setting of config.sample in `given` has no effect with any of `configs`.

    Args:
        named: makes a flag of the name of a setting.
    """
    effective = {key for config in configs for key in params(config)}
    for name in given:
        if f"sample.{name}" not in effective:
            raise UserError(f"{named(name)} has no effect here; jobs/sample.py --help says what it is for")


def flag(name: str) -> str:
    """The flag of a setting of config.sample."""
    return f"--{name.replace('_', '-')}"


def nearest_preset(config: Config) -> tuple[str, dict[str, Any]]:
    """The preset with the fewest differences from `config`, and these differences, without where data lies."""
    flat, locations = params(config), keys_that_affect(config, Affects.LOCATION)
    changes = {
        name: {key: value for key, value in flat.items() if key not in locations and value != known.get(key)}
        for name, known in ((name, flatten(preset)) for name, preset in presets.PRESETS.items())
    }
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
