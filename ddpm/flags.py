"""Flags of a config as a person types them: short names, and the few that --help shows. tyro makes all of them."""

import typing
from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
)

from ddpm.config import Config

SHORT = {
    "run.name": "--name",
    "run.storage": "--storage",
    "data.shards": "--data",
    "schedule.kind": "--schedule",
    "optim.lr": "--lr",
    "train.total_images": "--total-images",
    "train.batch_size": "--batch-size",
    "train.seed": "--seed",
    "sample.sampler": "--sampler",
    "cluster.num_workers": "--workers",
}
"""The flags of a config that people change first, and their short names."""
SHOWN_FIRST = {*SHORT, "data.images", "schedule.num_timesteps", "model.image_size", "model.num_classes"}
"""The flags of a config that --help shows."""
OTHER_TRAINERS = {
    **dict.fromkeys(("learning-rate", "train-lr"), "--lr"),
    **dict.fromkeys(("epochs", "num-epochs", "max-train-steps", "train-num-steps"), "--total-images"),
    **dict.fromkeys(("output-dir", "results-folder"), "--storage"),
    "resolution": "--model.image-size",
    "train-data-dir": "--data.images",
}
"""What other trainers call them, for messages; how long one trains is counted in images here."""
OTHER_SAMPLERS = {"ddpm": "ancestral"}
"""Names of samplers that a command line takes for others: Algorithm 2 of DDPM is ancestral sampling."""


def registry(taken: Collection[str] = (), only: Collection[str] | None = None) -> ConstructorRegistry:
    """What tyro learns of configs: short names and other names of samplers.

    Each rule changes what tyro's own rules answer; while it asks them, `asked` keeps it from answering itself.

    Args:
        taken: short names that are not given.
        only: the keys of a config that help shows, in one list; None: all, group by group.
    """
    made, asked = ConstructorRegistry(), False
    groups = {Config: ""} | {kind: f"{name}." for name, kind in typing.get_type_hints(Config).items()}

    @made.struct_rule
    def rule_of_group(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asked
        group = next((groups[kind] for kind in getattr(info.type, "__mro__", ()) if kind in groups), None)
        if asked or group is None:
            return None
        asked = True
        spec = ConstructorRegistry.get_struct_spec(info)
        asked = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        changed = []
        for field in spec.fields:
            key, asks = f"{group}{field.name}", None
            short = SHORT[key] if SHORT.get(key) not in (None, *taken) else ""
            if only is None:
                asks = tyro.conf.arg(aliases=[short] if short else None)
            elif not group:
                asks = tyro.conf.arg(name="")
            elif key in only:
                asks = tyro.conf.arg(name=short.removeprefix("--") or key)
            kind: Any = Annotated[field.type, tyro.conf.Suppress if asks is None else asks]
            changed.append(replace(field, type=kind))
        return replace(spec, fields=tuple(changed))

    @made.primitive_rule
    def rule_of_sampler(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        nonlocal asked
        if asked or not {*OTHER_SAMPLERS.values()} <= {*typing.get_args(info.type)}:
            return None
        asked = True
        spec = ConstructorRegistry.get_primitive_spec(info)
        asked = False
        if not isinstance(spec, PrimitiveConstructorSpec) or spec.choices is None:
            return None
        names = (*spec.choices, *OTHER_SAMPLERS)
        parsed = spec.instance_from_str
        return replace(
            spec,
            choices=names,
            metavar="{" + ",".join(names) + "}",
            instance_from_str=lambda words: parsed([OTHER_SAMPLERS.get(word, word) for word in words]),
        )

    return made
