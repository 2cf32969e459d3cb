"""The search space: a domain for each varied key of the config, parsed from flags.

    --space 'optim.lr=log(1e-5,1e-2)' 'schedule.kind=linear|cosine' 'schedule.num_timesteps=int(200,1000)'

    a|b|c               one of these; a single value fixes it
    uniform(low,high)   uniform between the bounds
    log(low,high)       uniform in the logarithm; low must be above 0
    int(low,high)       whole numbers, both ends included; intlog(low,high) is uniform in the logarithm

A key that only some kinds read is varied only where one of them was chosen: a cosine has no beta_end.
Nothing in a flag is executed.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import optuna
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

from ddpm.config import kinds
from ddpm.config.json import flatten, keys_that_affect, override
from ddpm.config.tree import Affects, Config
from ddpm.training import loop
from ddpm.utils.errors import UserError

NUM_CLASSES = "model.num_classes"
"""The one key besides those of Affects.TASK that changes the bounded quantity. The keys of objective. (label_dropout,
too) change only the net: the bound is computed from x_0_hat for any prediction, and a net with labels is always given
the label."""
CALL = re.compile(r"(uniform|log|int|intlog)\(([^,()]+),([^,()]+)\)")
MAX_CORNERS = 256
"""Largest number of combinations of a schedule's ends that are checked for each combination of kinds."""
MAX_TIMESTEPS = 10_000

DEFAULT = (
    f"schedule.kind={'|'.join(kinds.SCHEDULES)}",
    "schedule.beta_start=log(1e-5,1e-3)",  # 1e-4 in Ho et al. 2020; 8.5e-4 in Stable Diffusion (scaled_linear)
    # At T = 1000, linear from 1e-4: from too little noise (sqrt(alpha_bar_T) = 0.28) to noise far too early.
    "schedule.beta_end=log(0.005,0.1)",
    "schedule.cosine_s=log(1e-3,0.1)",  # 0.008 in Nichol & Dhariwal 2021
    "schedule.sigmoid_start=uniform(-6,-0.5)",  # Chen 2023 tries (-3, 3), (0, 3) and (-3, 0) among others
    "schedule.sigmoid_end=uniform(0.5,6)",
    "optim.lr=log(1e-4,1e-2)",
)
"""What a search varies without --space: not T, since the bound of any net gets tighter with it."""

Domain = FloatDistribution | IntDistribution | CategoricalDistribution


def ends(domain: Domain) -> tuple[Any, ...]:
    """The bounds of a range, or all values of a choice."""
    return domain.choices if isinstance(domain, CategoricalDistribution) else (domain.low, domain.high)


@dataclass(frozen=True)
class Space:
    """The domains of some keys; those that choose a kind come first."""

    domains: Mapping[str, Domain]
    base: Mapping[str, Any]
    """The flat config that trials change."""

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Optuna's value for each key that has an effect; kinds come first."""
        suggested: dict[str, Any] = {}
        for key, domain in self.domains.items():
            if self._has_effect(key, suggested):
                suggested[key] = _suggested(trial, key, domain)
        return suggested

    def check_grid(self) -> None:
        """Raise UserError if the space has a range, which has no grid."""
        for key, domain in self.domains.items():
            if not isinstance(domain, CategoricalDistribution):
                raise UserError(
                    f"--searcher grid needs values of {key}, such as --space {key}=a|b|c, not a range"
                )

    def grid(self, num_points: int) -> list[dict[str, Any]]:
        """The first combinations of all values, each with only the keys that have an effect."""
        return list(itertools.islice(self._combinations(), num_points))

    def corners(self) -> Iterator[dict[str, Any]]:
        """The ends of all domains: all combinations of a schedule's keys, and every other key alone."""
        of_schedule = {key: domain for key, domain in self.domains.items() if key.startswith("schedule.")}
        yield from Space(of_schedule, self.base)._combinations(MAX_CORNERS)
        for key, domain in self.domains.items():
            if key not in of_schedule:
                yield from ({key: end} for end in ends(domain))

    def unused(self) -> list[str]:
        """The keys that have an effect in no trial."""
        used = {key for point in self._combinations(1) for key in point}
        return [key for key in self.domains if key not in used]

    def as_json(self) -> dict[str, Any]:
        return {key: json.loads(distribution_to_json(domain)) for key, domain in self.domains.items()}

    def _has_effect(self, key: str, chosen: Mapping[str, Any]) -> bool:
        return key not in kinds.without_effect({**self.base, **chosen})

    def _combinations(self, num_per_kind: int | None = None) -> Iterator[dict[str, Any]]:
        """All combinations of the ends of all domains, or the first `num_per_kind` for each combination of kinds."""
        choices = [key for key in self.domains if key in kinds.TABLES]
        for names in itertools.product(*(ends(self.domains[key]) for key in choices)):
            chosen = dict(zip(choices, names, strict=True))
            keys = [key for key in self.domains if self._has_effect(key, chosen)]
            values = [(chosen[key],) if key in chosen else ends(self.domains[key]) for key in keys]
            for point in itertools.islice(itertools.product(*values), num_per_kind):
                yield dict(zip(keys, point, strict=True))


def domains_from_json(space: Mapping[str, Any]) -> dict[str, Domain]:
    """The domains of `Space.as_json`."""
    return {key: cast(Domain, json_to_distribution(json.dumps(domain))) for key, domain in space.items()}


def parse(flags: Sequence[str], base: Config) -> Space:
    """The space that `flags` describe around `base`."""
    domains: dict[str, Domain] = {}
    for flag in flags:
        key, equals, text = (part.strip() for part in flag.partition("="))
        if not equals or not text:
            raise UserError(
                f"--space {flag!r} has no domain; expected KEY=DOMAIN, such as 'optim.lr=log(1e-5,1e-2)'"
            )
        if key in domains:
            raise UserError(f"--space has {key} twice")
        domains[key] = _domain(key, text, base)
    choices = {key: domain for key, domain in domains.items() if key in kinds.TABLES}
    space = Space(choices | domains, flatten(base))
    _check(space, base)
    return space


def _check(space: Space, base: Config) -> None:
    """Raise UserError if trials are not comparable, a key has no effect, or a corner of the space cannot be trained."""
    classes = ends(space.domains[NUM_CLASSES]) if NUM_CLASSES in space.domains else (0,)
    if min(classes) == 0 < max(classes):
        raise UserError(
            f"--space cannot mix nets with and without labels, here {NUM_CLASSES} 0 and {max(classes)}: the bound is "
            "of log p(x | y) with labels and of log p(x) without, and the two are not comparable; search each under a "
            "--name of its own"
        )
    for key in space.unused():
        raise UserError(f"--space {key} changes nothing: it is read with {kinds.readers(key)} alone")
    timesteps = space.domains.get("schedule.num_timesteps")
    if timesteps is not None and max(ends(timesteps)) > MAX_TIMESTEPS:
        raise UserError(
            f"--space allows {max(ends(timesteps)):,} timesteps; at most {MAX_TIMESTEPS:,} are allowed"
        )
    for corner in space.corners():
        try:
            loop.check(override(base, corner))
        except UserError as error:
            shown = ", ".join(f"{key} {value}" for key, value in corner.items())
            raise UserError(f"--space allows {shown}, but {error}") from None


def _domain(key: str, text: str, base: Config) -> Domain:
    known = flatten(base)
    if key not in known:
        near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else "keys are those of config.json, such as optim.lr"
        )
        raise UserError(f"--space {key!r} is not a key of the config; {hint}")
    varies = keys_that_affect(base, Affects.NOISE | Affects.NET | Affects.LEARNING)
    if key not in varies - keys_that_affect(base, Affects.TASK):
        raise UserError(f"--space cannot vary {key}: all trials of a search must have the same value")
    if match := CALL.fullmatch(text.replace(" ", "")):
        form, low, high = match.groups()
        return _range(key, form, low, high, base)
    if "(" in text:
        raise UserError(
            f"--space {key}={text} is not understood; expected a|b|c, uniform(low,high), log(low,high), "
            "int(low,high) or intlog(low,high)"
        )
    values = tuple(_value(key, word.strip(), base) for word in text.split("|"))
    if len(set(values)) < len(values):
        raise UserError(f"--space {key}={text} has a value twice")
    return CategoricalDistribution(values)


def _range(key: str, form: str, low: str, high: str, base: Config) -> Domain:
    is_log = "log" in form
    is_int = "int" in form
    where = f"--space {key}={form}({low},{high})"
    try:
        bounds = [float(low), float(high)]
    except ValueError:
        raise UserError(f"{where}: bounds must be numbers") from None
    if not all(map(math.isfinite, bounds)) or not bounds[0] < bounds[1]:
        raise UserError(f"{where}: bounds must be finite, the low one below the high one")
    if is_log and bounds[0] <= 0:
        raise UserError(f"{where}: a logarithm's low bound must be above 0")
    if is_int and not all(bound.is_integer() for bound in bounds):
        raise UserError(f"{where}: bounds must be whole numbers")
    for bound in bounds:
        value = int(bound) if is_int else bound
        try:
            override(base, {key: value})
        except UserError as error:
            other = " (whole numbers: int or intlog)" if not is_int else ""
            raise UserError(f"{where}: {error}{other}") from None
    if is_int:
        return IntDistribution(int(bounds[0]), int(bounds[1]), log=is_log)
    return FloatDistribution(bounds[0], bounds[1], log=is_log)


def _suggested(trial: optuna.Trial, key: str, domain: Domain) -> Any:
    match domain:
        case CategoricalDistribution():
            return trial.suggest_categorical(key, domain.choices)
        case IntDistribution():
            return trial.suggest_int(key, domain.low, domain.high, log=domain.log)
    return trial.suggest_float(key, domain.low, domain.high, log=domain.log)


def _value(key: str, word: str, base: Config) -> Any:
    """`word` as the config's type: the first of int, float, bool, None and str that it accepts."""
    readings: list[Any] = []
    for read in (int, float):
        try:
            readings.append(read(word))
        except ValueError:
            continue
    readings += [{"true": True, "false": False, "none": None}.get(word.lower(), word), word]
    error = None
    for reading in readings:
        try:
            made = override(base, {key: reading})
        except UserError as why:
            error = error or why
            continue
        return flatten(made)[key]
    raise UserError(f"--space {key}={word}: {error}")
