"""Reading, writing, checking and changing config trees (tree.py). Unknown keys are errors; nothing is executed."""

import dataclasses
import json
import re
import reprlib
import shlex
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ddpm.config import kinds
from ddpm.config.tree import Affects, Config, ModelConfig, UNetConfig
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """(dotted key, value, annotation, group) of each field, in the order of the tree."""
    annotations = typing.get_type_hints(type(config), include_extras=True)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, annotations[f.name], config


def flatten(config: Any) -> dict[str, Any]:
    """A config tree as {"model.base_width": 128, ...}, in the order of the tree."""
    return {key: value for key, value, _, _ in _leaves(config)}


def keys_that_affect(config: Config, what: Affects) -> set[str]:
    """The dotted keys that affect any of `what`."""
    keys = set()
    for key, _, annotation, group in _leaves(config):
        affects = group.affects
        for mark in typing.get_args(annotation):
            if isinstance(mark, Affects):  # the field's own
                affects = mark
        if affects & what:
            keys.add(key)
    return keys


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of `config` with dotted keys replaced: override(config, {"optim.lr": 1e-4})."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return _parsed(tree, "config", config)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first differences between flat configs, such as "optim.lr 0.1 (now 0.2), ..."; empty: there are none."""
    changed = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    listed = [f"{key} {before.get(key)} (now {now.get(key)})" for key in changed[:4]]
    if len(changed) > 4:
        listed.append("...")
    return ", ".join(listed)


def flags(values: Mapping[str, Any]) -> str:
    """Dotted keys and their values as flags of a command line: "--model.num-classes 10 --no-train.deterministic"."""
    words = []
    for key, value in values.items():
        group, dot, name = key.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            words.append(f"--{group}{dot}{name}" if value else f"--{group}{dot}no-{name}")
        else:
            parts = value if isinstance(value, list | tuple) else [value]
            words += [f"--{group}{dot}{name}", *(shlex.quote(str(part)) for part in parts)]
    return " ".join(words)


def check_values(config: Any) -> None:
    """Raise UserError for the first value outside its field's range, with its dotted key.

    The fields of a command line's `config`, `source` and `settings` are flags without that prefix.
    """
    for key, value, annotation, _ in _leaves(config):
        strict_json.check(annotation, value, re.sub(r"^(config|source|settings)\.", "", key))


def to_json(config: Any) -> str:
    """`config` as indented JSON, the format of config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str | bytes, where: str = "config.json", base: Config | None = None) -> Config:
    """The config that `to_json` wrote to the file `where`; keys that it lacks are those of `base`, or have defaults."""
    values = strict_json.parse(dict[str, Any], text, where)
    return _parsed(values, where, base)


def _parsed(values: Mapping[str, Any], where: str, base: Config | None) -> Config:
    """The config of nested values; keys that they lack are those of `base`, or have defaults."""
    tree = {} if base is None else dataclasses.asdict(base)
    for group, value in values.items():
        both = isinstance(tree.get(group), dict) and isinstance(value, Mapping)
        tree[group] = tree[group] | value if both else value
    model = tree.pop("model", {})
    given = values.get("model", {})
    config = strict_json.parse(Config, json.dumps(tree, default=_as_json), where)
    kind: type[ModelConfig] = UNetConfig
    if isinstance(model, dict):
        kind = net_named(model.get("net", "unet"), where)
        if base is not None and type(base.model) is not kind:  # keeps what all nets have
            common = {f.name for f in dataclasses.fields(ModelConfig)}
            model = {key: value for key, value in model.items() if key in common or key in given}
    net = strict_json.parse(kind, json.dumps(model, default=_as_json), where, within="model")
    return dataclasses.replace(config, model=net)


def _as_json(value: Any) -> Any:
    """A number of NumPy as Python's; any other value, such as a path, as text."""
    return value.item() if hasattr(value, "item") else str(value)


def net_named(name: Any, where: str) -> type[ModelConfig]:
    """The config class of a net, ours or an installed package's; `where` is the file or flag with its name."""
    field = "model.net"
    if not isinstance(name, str) or not kinds.is_known(field, name):
        must = kinds.expected(field, name)
        raise UserError(f"{where}: {field} is {reprlib.repr(name)}; it must {must}")
    cls = kinds.find(field, name).load()
    if not (isinstance(cls, type) and issubclass(cls, ModelConfig) and getattr(cls, "net", None) == name):
        raise UserError(
            f"the target of the net {name!r} must be a subclass of ddpm.config.tree.ModelConfig with net = {name!r}"
        )
    return cls
