"""The search space: a domain for each varied key of the config, parsed from flags; tune/space.py explains the forms."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm.config import Config, flatten, override
from ddpm.diffusion.schedules import SCHEDULES
from ddpm.training import loop
from ddpm.utils.errors import UserError

KINDS = {
    f"schedule.{field}": tuple(kind for kind, (_, fields) in SCHEDULES.items() if field in fields)
    for _, fields in SCHEDULES.values()
    for field in fields
}
"""The kinds of schedule that use a key; all kinds use the other keys."""
KIND = "schedule.kind"
NUM_CLASSES = "model.num_classes"
"""The one key besides FIXED that changes the bounded quantity. The keys of objective. (label_dropout, too) change only
the net: the bound is computed from x_0_hat for any prediction, and a net with labels is always given the label."""
FIXED = (
    "data.",
    "run.",
    "cluster.",
    "sample.",
    "train.",
    "model.image_size",
    "model.channels",
    "objective.process",
)
"""Keys that a search cannot vary: all trials must run and be evaluated alike."""
FREE = ("train.batch_size", "train.micro_batch_size", "train.precision")
"""Exceptions in train. that a search can vary."""
CALL = re.compile(r"(uniform|log|int|intlog)\(([^,()]+),([^,()]+)\)")
MAX_CORNERS = 256
MAX_TIMESTEPS = 10_000

Ask = Callable[[str, "Domain"], Any]


@dataclass(frozen=True)
class Choice:
    """A choice among values."""

    values: tuple[Any, ...]

    def at(self, u: float) -> Any:
        """The value at u in [0, 1); a uniform u gives every value the same probability."""
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]

    def grid(self, num_points: int) -> tuple[Any, ...]:
        return self.values

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.values


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included."""

    low: float
    high: float
    is_log: bool = False
    is_int: bool = False

    def at(self, u: float) -> float | int:
        """The value at u in [0, 1], on a linear or a logarithmic scale."""
        low, high = (self.low - 0.5, self.high + 0.5) if self.is_int else (self.low, self.high)
        value = low * (high / low) ** u if self.is_log else low + (high - low) * u
        value = min(max(round(value) if self.is_int else value, self.low), self.high)
        return int(value) if self.is_int else float(value)

    def grid(self, num_points: int) -> tuple[Any, ...]:
        us = [0.5] if num_points == 1 else [i / (num_points - 1) for i in range(num_points)]
        return tuple(dict.fromkeys(self.at(u) for u in us))

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.at(0.0), self.at(1.0)


Domain = Choice | Range


@dataclass(frozen=True)
class Space:
    """The domains of some keys; a schedule's kind comes first."""

    domains: Mapping[str, Domain]
    kind: str
    """The kind of the config's schedule, if the kind is not varied."""

    @property
    def has_schedule(self) -> bool:
        """Whether trials differ in their noise schedules, or in the meaning of their loss."""
        return any(key.startswith(("schedule.", "objective.")) for key in self.domains)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of schedule that trials can have."""
        return self.domains[KIND].ends if KIND in self.domains else (self.kind,)

    def suggest(self, ask: Ask) -> dict[str, Any]:
        """A value from `ask` for each key that matters; the kind is asked for first."""
        found: dict[str, Any] = {}
        for key, domain in self.domains.items():
            if found.get(KIND, self.kind) in KINDS.get(key, (found.get(KIND, self.kind),)):
                found[key] = ask(key, domain)
        return found

    def sample(self, seed: int, number: int) -> dict[str, Any]:
        """Trial `number` of a random search: a function of the seed and the number alone."""
        rng = np.random.default_rng([seed, number])
        return self.suggest(lambda key, domain: domain.at(rng.random()))

    def grid(self, num_points: int) -> list[dict[str, Any]]:
        """Every combination, with `num_points` of each range; each kind has only its own keys."""
        found = []
        for kind in self.kinds:
            keys = self._keys_of(kind)
            points = [(kind,) if key == KIND else self.domains[key].grid(num_points) for key in keys]
            found += [dict(zip(keys, values, strict=True)) for values in itertools.product(*points)]
        return found

    def corners(self) -> Iterator[dict[str, Any]]:
        """The ends of all domains: all combinations of a schedule's keys, and every other key alone."""
        for kind in self.kinds:
            keys = [key for key in self._keys_of(kind) if key != KIND]
            of_schedule = [key for key in keys if key.startswith("schedule.")]
            chosen = {KIND: kind} if KIND in self.domains else {}
            ends = itertools.product(*(self.domains[key].ends for key in of_schedule))
            for values in itertools.islice(ends, MAX_CORNERS):
                yield chosen | dict(zip(of_schedule, values, strict=True))
        for key in self.domains:
            if not key.startswith("schedule."):
                yield from ({key: end} for end in self.domains[key].ends)

    def as_json(self) -> dict[str, Any]:
        return {key: dataclasses.asdict(domain) for key, domain in self.domains.items()}

    def _keys_of(self, kind: str) -> list[str]:
        return [key for key in self.domains if kind in KINDS.get(key, (kind,))]


def parse(flags: Sequence[str], base: Config) -> Space:
    """The space that `flags` describe around `base`.

    Raises:
        UserError: a flag is not KEY=DOMAIN, a key is unknown, a value has the wrong type, or a trial at the bounds
            could not begin.
    """
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
    if KIND in domains:
        domains = {KIND: domains[KIND]} | domains
    classes = domains.get(NUM_CLASSES)
    if classes is not None and min(classes.ends) == 0 < max(classes.ends):
        raise UserError(
            f"--space cannot mix nets with and without labels, here {NUM_CLASSES} 0 and {max(classes.ends)}: the bound "
            "is of log p(x | y) with labels and of log p(x) without, and the two are not comparable; search each under "
            "a --name of its own"
        )
    space = Space(domains, base.schedule.kind)
    for key in domains:
        if not set(space.kinds) & set(KINDS.get(key, space.kinds)):
            raise UserError(
                f"--space {key} changes nothing: it is used by {' and '.join(KINDS[key])}, and {KIND} is "
                f"{' or '.join(space.kinds)}"
            )
    timesteps = domains.get("schedule.num_timesteps")
    if timesteps is not None and max(timesteps.ends) > MAX_TIMESTEPS:
        raise UserError(
            f"--space allows {max(timesteps.ends):,} timesteps; at most {MAX_TIMESTEPS:,} are allowed"
        )
    for corner in space.corners():
        try:
            loop.check(override(base, corner))
        except UserError as error:
            shown = ", ".join(f"{key} {value}" for key, value in corner.items())
            raise UserError(f"--space allows {shown}, but {error}") from None
    return space


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
    if key.startswith(FIXED) and key not in FREE:
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
    return Choice(values)


def _range(key: str, form: str, low: str, high: str, base: Config) -> Range:
    is_log, is_int = "log" in form, "int" in form
    where = f"--space {key}={form}({low},{high})"
    try:
        ends = [float(low), float(high)]
    except ValueError:
        raise UserError(f"{where}: bounds must be numbers") from None
    if not all(map(math.isfinite, ends)) or not ends[0] < ends[1]:
        raise UserError(f"{where}: bounds must be finite, the low one below the high one")
    if is_log and ends[0] <= 0:
        raise UserError(f"{where}: a logarithm's low bound must be above 0")
    if is_int and not all(end.is_integer() for end in ends):
        raise UserError(f"{where}: bounds must be whole numbers")
    for end in ends:
        value = int(end) if is_int else end
        try:
            override(base, {key: value})
        except UserError as error:
            other = " (whole numbers: int or intlog)" if not is_int else ""
            raise UserError(f"{where}: {error}{other}") from None
    return Range(ends[0], ends[1], is_log, is_int)


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
