"""The kinds that a name in the configuration selects: what builds each, and which settings it reads.

A table for each field that holds such a name. The tables are data: nothing here imports what builds a kind before it
is needed, so a command line is checked, and its help shown, without PyTorch.

An installed package adds a `Kind` to a table by an entry point of the table's group (docs/design/extending.md). A name
selects a line of the table or such an entry point. It is not an import path: a config.json brings no code.
"""

import difflib
import functools
import inspect
import pkgutil
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoints, entry_points
from typing import Any

from ddpm.utils.errors import UserError

AUTO = "auto"
"""As a sampler: the first that reverses the objective's process. As a spacing: the sampler's own."""


@dataclass(frozen=True)
class Kind:
    """A line of a table."""

    target: str = ""
    """What builds it, "module:attribute"; empty where the code that reads the name has all cases."""
    reads: tuple[str, ...] = ()
    """The settings that only some kinds read: keys of the configuration, such as "schedule.beta_end"."""

    def load(self) -> Any:
        """The target, which imports its module."""
        return pkgutil.resolve_name(self.target)

    def build(self, **available: Any) -> Any:
        """Call the target with those of `available` that it has as parameters."""
        target = self.load()
        return target(**accepted(target, available))


@dataclass(frozen=True)
class ObjectiveKind(Kind):
    """An objective: a forward process and a loss."""

    process: str = "gaussian"
    """The forward process. Samplers that reverse it can be used."""
    has_bound: bool = False
    """Whether there is a variational bound, so bits/dim."""
    has_uniform_noise: bool = False
    """Whether noise is uniform in [-1, 1), instead of standard normal."""

    @property
    def uses_time(self) -> bool:
        """Whether there is a noise schedule, so that the net is given t."""
        return "schedule.kind" in self.reads


@dataclass(frozen=True)
class SamplerKind(Kind):
    """A sampler."""

    process: str = "gaussian"
    """The forward process that it reverses."""
    num_sample_steps: int | None = 50
    """The default number of steps; None: all T."""
    spacing: str = "uniform"
    """The spacing that `auto` means."""
    timesteps: str = "ddpm.diffusion.timesteps:spaced"
    """The function that chooses the timesteps, "module:attribute"; for samplers that read sample.spacing."""


OBJECTIVES = {
    "gaussian": ObjectiveKind(
        "ddpm.diffusion.objectives:gaussian",
        (
            "schedule.kind",
            "schedule.num_timesteps",
            "objective.predict",
            "objective.weight",
            "objective.variance",
            "objective.timesteps",
        ),
        has_bound=True,
    ),
    "uniform_mix": ObjectiveKind(
        "ddpm.diffusion.objectives:UniformMix", process="uniform_mix", has_uniform_noise=True
    ),
}
PREDICTIONS = {
    "eps": Kind("ddpm.diffusion.objectives:Eps"),
    "x_0": Kind("ddpm.diffusion.objectives:X0"),
    "v": Kind("ddpm.diffusion.objectives:V"),
    "edm": Kind("ddpm.diffusion.objectives:Edm", ("objective.sigma_data",)),
    "flow": Kind("ddpm.diffusion.objectives:Flow"),
}
WEIGHTS = {
    "simple": Kind(),
    "min_snr": Kind(reads=("objective.min_snr_gamma",)),
    "edm": Kind(reads=("objective.sigma_data",)),
    "flow": Kind(),
}
TIMESTEPS = {
    "uniform": Kind(),
    "log_normal": Kind(reads=("objective.log_sigma_mean", "objective.log_sigma_std")),
    "logit_normal": Kind(reads=("objective.log_sigma_mean", "objective.log_sigma_std")),
}
SCHEDULES = {
    "linear": Kind("ddpm.diffusion.schedules:linear", ("schedule.beta_start", "schedule.beta_end")),
    "scaled_linear": Kind(
        "ddpm.diffusion.schedules:scaled_linear", ("schedule.beta_start", "schedule.beta_end")
    ),
    "cosine": Kind("ddpm.diffusion.schedules:cosine", ("schedule.cosine_s", "schedule.max_beta")),
    "sigmoid": Kind(
        "ddpm.diffusion.schedules:sigmoid",
        ("schedule.sigmoid_start", "schedule.sigmoid_end", "schedule.sigmoid_tau", "schedule.max_beta"),
    ),
    "straight": Kind("ddpm.diffusion.schedules:straight", ("schedule.max_beta",)),
    "geometric": Kind("ddpm.diffusion.schedules:geometric", ("schedule.sigma_min", "schedule.sigma_max")),
}
SAMPLERS = {
    "ddim": SamplerKind("ddpm.diffusion.samplers:ddim", ("sample.spacing", "sample.eta", "sample.clip_x_0")),
    "ddpm": SamplerKind(
        "ddpm.diffusion.samplers:ancestral",
        ("sample.spacing", "sample.mean", "sample.variance"),
        num_sample_steps=None,
    ),
    "dpmpp_2m": SamplerKind(
        "ddpm.diffusion.samplers:dpmpp_2m",
        ("sample.spacing", "sample.eta", "sample.clip_x_0"),
        spacing="karras",
    ),
    "heun": SamplerKind(
        "ddpm.diffusion.samplers:heun",
        ("sample.spacing", "sample.clip_x_0"),
        spacing="karras",
        timesteps="ddpm.diffusion.timesteps:spaced_for_heun",
    ),
    "mix": SamplerKind("ddpm.diffusion.samplers:mix", ("sample.clip_x_0",), process="uniform_mix"),
}
SPACINGS = {
    "uniform": Kind(),
    "quadratic": Kind(),
    "karras": Kind(reads=("sample.rho", "sample.sigma_min")),
}
NETS = {"unet": Kind("ddpm.config.tree:UNetConfig")}
"""Targets are subclasses of `ddpm.config.tree.ModelConfig`."""
SOURCES = {
    "digits": Kind("ddpm.data.sources.sources:Digits"),
    "fashion-mnist": Kind("ddpm.data.sources.torchvision:FashionMnist"),
    "folder": Kind("ddpm.data.sources.image_folder:Folder"),
    "torchvision": Kind("ddpm.data.sources.torchvision:Torchvision"),
    "parquet": Kind("ddpm.data.sources.huggingface:HuggingFace"),
}
"""Targets are frozen dataclasses of a source's options, whose docstrings are the help of `ddpm prepare`."""
FEATURE_NETS = {
    "classifier": Kind("ddpm.evaluation.classifier:build"),
    "inception": Kind("ddpm.evaluation.inception:Inception"),
    "lite0": Kind("ddpm.evaluation.nets:Lite0"),
    "pixels": Kind("ddpm.evaluation.nets:PixelFeatures"),
}
AUTOENCODERS = {"diffusers": Kind("ddpm.latents.diffusers:load")}
"""Targets load an autoencoder (ddpm/latents/autoencoder.py) from the text behind KIND:, such as a folder of weights."""

TABLES: dict[str, Mapping[str, Kind]] = {
    "objective.process": OBJECTIVES,
    "objective.predict": PREDICTIONS,
    "objective.weight": WEIGHTS,
    "objective.timesteps": TIMESTEPS,
    "schedule.kind": SCHEDULES,
    "sample.sampler": SAMPLERS,
    "sample.spacing": SPACINGS,
    "model.net": NETS,
    "data.source": SOURCES,
    "data.autoencoder": AUTOENCODERS,
    "features": FEATURE_NETS,
}
"""The tables by the field that holds the name. A field stands after those whose kinds read it."""
GROUPS = {
    "objective.process": "ddpm.objectives",
    "schedule.kind": "ddpm.schedules",
    "sample.sampler": "ddpm.samplers",
    "model.net": "ddpm.nets",
    "data.source": "ddpm.sources",
    "data.autoencoder": "ddpm.autoencoders",
    "features": "ddpm.feature_nets",
}
"""The groups of entry points that add to a table."""
CLASSES: dict[str, type[Kind]] = {"objective.process": ObjectiveKind, "sample.sampler": SamplerKind}
"""The class of a table's kinds; `Kind` for the other tables."""
EXAMPLES: dict[str, Mapping[str, str]] = {
    "objective.process": {"consistency": "examples/consistency"},
    "sample.sampler": {"multistep": "examples/consistency"},
    "model.net": {"dit": "examples/dit"},
    "data.source": {"glyphs": "examples/glyphs"},
    "data.autoencoder": {"taef2": "examples/taef2"},
}
"""Names of kinds that examples add, by field, and the folder of the example."""

READ_BY_SOME = {key for table in TABLES.values() for kind in table.values() for key in kind.reads}
"""Settings that only some kinds read. All other settings always have an effect."""
READING = [field for field, table in TABLES.items() if any(kind.reads for kind in table.values())]
"""The fields whose kinds read settings; a field stands after those whose kinds read it."""


def names(field: str) -> list[str]:
    """The names of all kinds of a field: those of its table, then those of installed packages."""
    return list(dict.fromkeys([*TABLES[field], *sorted(_installed(field).names)]))


def find(field: str, name: str) -> Kind:
    """The kind called `name`; a package cannot replace one of the table."""
    kind = TABLES[field].get(name)
    if kind is not None:
        return kind
    installed = list(_installed(field).select(name=name))
    if not installed:
        raise UserError(f"{field} is {reprlib.repr(name)}; it must {expected(field, name)}")
    entry = installed[0]
    package = entry.dist.name if entry.dist else "unknown"
    what = f"{entry.group}: {name!r} of the package {package}"
    try:
        kind = entry.load()
    except Exception as error:  # importing a package may raise anything
        message = " ".join(str(error).split())
        raise UserError(f"{what} cannot be imported: {type(error).__name__}: {message}") from error
    right = CLASSES.get(field, Kind)
    if not isinstance(kind, right):
        raise UserError(f"{what} must be a ddpm.config.kinds.{right.__name__}")
    return kind


def objective(name: str) -> ObjectiveKind:
    """The kind of an objective."""
    kind: Any = find("objective.process", name)
    return kind


def sampler(name: str) -> SamplerKind:
    """The kind of a sampler."""
    kind: Any = find("sample.sampler", name)
    return kind


def is_known(field: str, name: str) -> bool:
    """Whether there is a kind called `name`."""
    return name in TABLES[field] or name in _installed(field).names


def expected(field: str, name: object, also: tuple[str, ...] = ()) -> str:
    """What the value of a field must be instead of the unknown `name`: "be one of linear, ..."."""
    if not isinstance(name, str):
        name = ""
    folder = EXAMPLES.get(field, {}).get(name)
    if folder is not None:
        return f"be on PYTHONPATH: it is an example, in {folder}"
    known = [*also, *names(field)]
    text = f"be one of {', '.join(known)}"
    if field in GROUPS:
        text += ", or of an installed package"
    close = difflib.get_close_matches(name, known, n=1)
    return f"{text} (did you mean {close[0]}?)" if close else text


def default_sampler(process: str) -> str:
    """The first sampler that reverses `process`."""
    for name in names("sample.sampler"):
        if sampler(name).process == process:
            return name
    raise UserError(f"no sampler reverses the process {process}")


def samplers_of(process: str) -> list[str]:
    """The names of the samplers that reverse `process`."""
    return [name for name in names("sample.sampler") if sampler(name).process == process]


def selected(values: Mapping[str, Any]) -> dict[str, str]:
    """The kind in each field of a flat config, with `auto` resolved."""
    chosen = {field: values[field] for field in TABLES if field in values}
    if chosen["sample.sampler"] == AUTO:
        chosen["sample.sampler"] = default_sampler(objective(chosen["objective.process"]).process)
    if chosen["sample.spacing"] == AUTO:
        chosen["sample.spacing"] = sampler(chosen["sample.sampler"]).spacing
    return chosen


def without_effect(values: Mapping[str, Any]) -> set[str]:
    """The settings of a flat config that none of its kinds reads.

    A field that itself has no effect selects nothing: without a noise schedule, the kind of schedule reads no settings.
    """
    read: set[str] = set()
    chosen = selected(values)
    for field in READING:
        if field in read or field not in READ_BY_SOME:
            read.update(find(field, chosen[field]).reads)
    return READ_BY_SOME - read


def readers(key: str) -> str:
    """What reads a setting: "schedule.kind linear or scaled_linear"."""
    found = []
    for field, table in TABLES.items():
        reading = [name for name, kind in table.items() if key in kind.reads]
        if reading:
            found.append(f"{field} {' or '.join(reading)}")
    return ", ".join(found)


def accepted(target: Callable[..., Any], available: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `available` that `target` has as parameters."""
    parameters = inspect.signature(target).parameters
    return {name: value for name, value in available.items() if name in parameters}


@dataclass(frozen=True)
class Choice:
    """Annotates a field that holds the name of a kind: pydantic checks it, and `--help` lists the names."""

    field: str
    also: tuple[str, ...] = ()
    """Values that are no kind."""

    @property
    def names(self) -> list[str]:
        """All valid values."""
        return [*self.also, *names(self.field)]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import PydanticCustomError, core_schema  # 0.1 s

        def check(name: str) -> str:
            if name not in self.also and not is_known(self.field, name):
                text = expected(self.field, name, self.also)
                raise PydanticCustomError("unknown_kind", "Input should {text}", {"text": text})
            return name

        return core_schema.no_info_after_validator_function(check, handler(source))


def _installed(field: str) -> EntryPoints:
    """The entry points of installed packages for a field."""
    return _entry_points(GROUPS.get(field, ""), tuple(sys.path))


@functools.lru_cache
def _entry_points(group: str, path: tuple[str, ...]) -> EntryPoints:
    """The entry points of a group on `path`, which is sys.path; to read them takes 10 ms."""
    return entry_points(group=group)
