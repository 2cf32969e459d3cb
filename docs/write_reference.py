"""Writes the generated pages of docs/reference: commands.md, configuration.md, presets.md.

    make reference

The commands and the configuration are read from the dataclasses that tyro turns into flags: a page has what
`--help-all` has, and for each field whether a run may change it when it resumes. The presets are computed.
"""

import ast
import importlib
import inspect
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt

from ddpm.cli import parsing, program
from ddpm.config import kinds, presets
from ddpm.config.json import flatten
from ddpm.config.kinds import Choice
from ddpm.config.presets import PresetArguments
from ddpm.config.tree import Affects, Config, ModelConfig
from ddpm.runs import settings
from ddpm.training.footprint import footprint

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/write_reference.py: `make reference` renews this page. -->"
DATA_FIELDS = (*settings.PATHS, "data.source")
"""Where the images come from. A run that resumes compares the fingerprint of the images instead."""
SAME_IMAGES = "same images"
NO = "no"
NAMED = "with a name"
UNUSED = "no effect"
YES = "yes"
GROUP_TITLES = {
    "data": "Data",
    "schedule": "Noise schedule",
    "objective": "Objective",
    "model": "Net",
    "optim": "Optimizer",
    "train": "Training",
    "sample": "Sampling",
    "cluster": "Cluster",
    "run": "Run",
}
RATES = {
    "digits": ("2 CPU cores", "benchmarks/runtime.md", ("2 x 1", "RayRuntime, MLflow on")),
    "fashion-mnist": ("2 CPU cores", "benchmarks/busy-fashion-mnist.md", ("2 workers of 1 thread",)),
    "cifar10": ("one H100", "docs/design/scale.md", ("`cifar10`", "1")),
    "celeba64": ("one H100", "docs/design/scale.md", ("`celeba64`", "1")),
}
"""Images/s of a preset: hardware, the page that has them, and the first cells of its row there."""


@dataclass(frozen=True)
class Flag:
    """A field of a dataclass as a flag."""

    name: str
    short: str
    default: str
    values: str
    text: str
    is_positional: bool = False


def docstrings(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                found[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return found


def marks(kind: Any) -> tuple[Any, ...]:
    """What annotates a type, outermost last."""
    return getattr(kind, "__metadata__", ())


def plain(kind: Any) -> Any:
    """A type without its annotations."""
    return typing.get_args(kind)[0] if marks(kind) else kind


def number(value: float) -> str:
    """A bound of a range."""
    if isinstance(value, int) and value > 10**6 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def bounds(kind: Any) -> str:
    """The range on a number: "1 to 4,096", "> 0"; empty: it has none."""
    low = high = ""
    for mark in marks(kind):
        match mark:
            case Interval(ge=ge, gt=gt, le=le, lt=lt):
                low = f"≥ {number(ge)}" if ge is not None else f"> {number(gt)}" if gt is not None else low
                high = f"≤ {number(le)}" if le is not None else f"< {number(lt)}" if lt is not None else high
            case Ge(ge=ge):
                low = f"≥ {number(ge)}"
            case Gt(gt=gt):
                low = f"> {number(gt)}"
            case Le(le=le):
                high = f"≤ {number(le)}"
            case Lt(lt=lt):
                high = f"< {number(lt)}"
    if low.startswith("≥") and high.startswith("≤"):
        return f"{low[2:]} to {high[2:]}"
    return ", ".join(filter(None, (low, high)))


def values(kind: Any) -> str:
    """What a flag of this type takes."""
    choices = [mark for mark in marks(kind) if isinstance(mark, Choice)]
    if choices:
        names = [*choices[0].also, *kinds.TABLES[choices[0].field]]
        return ", ".join(f"`{name}`" for name in names)
    bare = plain(kind)
    origin = typing.get_origin(bare)
    inner = typing.get_args(bare)
    if origin is Literal:
        return ", ".join(f"`{name}`" for name in inner)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(values(each) for each in inner if each is not type(None)))
    if origin is tuple and inner[-1] is ...:
        return f"list: {values(inner[0])}"
    if origin is tuple:
        return f"{len(inner)} numbers"
    if bare is bool:
        return "yes or no"
    if bare in (int, float):
        word = "integer" if bare is int else "number"
        return f"{word} {bounds(kind)}".strip()
    return "path" if bare is Path else "text"


def shown(value: Any) -> str:
    """A default."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == ():
        return "none"
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`"
    return f"`{value}`"


def default_of(field: "Field[Any]") -> str:
    if field.default is not MISSING:
        return shown(field.default)
    return shown(field.default_factory()) if field.default_factory is not MISSING else "required"


def flags(cls: Any) -> Iterator[Flag]:
    """The flags of a dataclass, with those of the dataclasses inside that have no name of their own."""
    origin = typing.get_origin(cls) or cls
    of_variable = dict(zip(getattr(origin, "__parameters__", ()), typing.get_args(cls), strict=True))
    hints = typing.get_type_hints(origin, include_extras=True)
    texts = docstrings(origin)
    for field in fields(origin):
        kind = hints[field.name]
        if not field.init or any("Suppress" in str(mark) for mark in marks(kind)):
            continue
        arguments = [mark for mark in marks(kind) if hasattr(mark, "metavar")]
        bare = plain(kind)
        bare = of_variable.get(bare, bare)
        if is_dataclass(bare):
            if bare is not Config:
                yield from flags(bare)
            continue
        name = (arguments[0].name if arguments else None) or field.name.replace("_", "-")
        aliases = (arguments[0].aliases if arguments else None) or ()
        metavar = arguments[0].metavar if arguments else None
        is_positional = any("Positional" in str(mark) or "POSITIONAL" in str(mark) for mark in marks(kind))
        text = texts.get(field.name, "")
        if is_positional:
            yield Flag(f"`{metavar}`", "", default_of(field), values(kind), text, is_positional=True)
        else:
            short = ", ".join(f"`{alias}`" for alias in aliases)
            takes = f"`{metavar}`" if metavar else values(kind)
            yield Flag(f"`--{name}`", short, default_of(field), takes, text)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def flag_table(found: list[Flag]) -> str:
    """A table of flags, positional arguments first."""
    rows = []
    for flag in sorted(found, key=lambda flag: not flag.is_positional):
        name = f"{flag.short}, {flag.name}" if flag.short else flag.name
        rows.append([name, flag.default, flag.values, flag.text])
    return table(["flag", "default", "values", "what it does"], rows)


# commands.md


def commands() -> str:
    """commands.md."""
    parts = [
        "# Commands",
        NOTE,
        "`ddpm COMMAND --help` shows the flags of a command, `ddpm COMMAND PRESET --help-all` every flag "
        "of a preset. In a checkout, `python jobs/train.py` is `ddpm train`, `python jobs/sample.py` is "
        "`ddpm sample`, and so on; `python tune/search.py` is `ddpm search`. These are what `ray job "
        "submit` runs.",
        "`RUN` is the folder or `s3://` URI of a run (its newest checkpoint) or of a checkpoint, "
        "`builtin:NAME` for a built-in net, or `models:/NAME@ALIAS` for a net in MLflow's registry.",
        "Exit status: 0 when done, 2 for a mistake in the command (one line says what would be right), 130 "
        "after Ctrl-C, 143 after SIGTERM, 129 after a closed terminal.",
        table(
            ["command", "what it does"],
            [[f"[`ddpm {name}`](#ddpm-{name})", about] for name, about in program.COMMANDS.items()],
        ),
    ]
    for name in program.COMMANDS:
        parts.extend(command(name))
    return "\n\n".join(parts) + "\n"


def command(name: str) -> Iterator[str]:
    """The section of a command."""
    module = importlib.import_module(f"ddpm.cli.{name}")
    yield f"## ddpm {name}"
    first, _, more = (module.__doc__ or "").partition("\n\n")
    about, _, usage = " ".join(first.split()).partition(": ddpm ")
    yield f"{about}."
    yield f"```sh\nddpm {usage.rstrip('.')}\n```"
    if more:
        yield paragraphs(more)
    cls: Any = getattr(module, "Arguments", None) or getattr(module, "TrainArguments", PresetArguments)
    if name == "prepare":
        yield from sources(cls)
        return
    if issubclass(cls, PresetArguments):
        yield (
            "PRESET is one of those in [Presets](presets.md). Each field of the "
            "[configuration](configuration.md) is a flag, too: `optim.lr` is `--optim.lr`, or `--lr`."
        )
    yield flag_table(list(flags(cls)))
    if name == "train":
        yield "Common flags of the configuration:"
        yield table(["flag", "values", "what it does"], list(common_rows()))


def common_rows() -> Iterator[list[str]]:
    """The fields of the configuration that `--help` shows."""
    for group in typing.get_type_hints(Config):
        for key, row in field_rows(group, type(getattr(Config(), group))):
            if key in parsing.SHOWN_FIRST:
                flag, _, short = row[0].partition(", ")
                yield [short or flag, row[2], row[4]]


def sources(cls: Any) -> Iterator[str]:
    """What every source takes, and what each source takes besides."""
    names = list(kinds.SOURCES)
    found = {name: list(flags(cls[kinds.SOURCES[name].load()])) for name in names}
    common = [flag for flag in found[names[0]] if all(flag in flags_of for flags_of in found.values())]
    yield f"SOURCE is one of {', '.join(f'`{name}`' for name in names)}, or a source of an installed package."
    yield flag_table(common)
    for name in names:
        own = [flag for flag in found[name] if flag not in common]
        about = " ".join((kinds.SOURCES[name].load().__doc__ or "").split("\n\n")[0].split())
        yield f"### ddpm prepare {name}"
        yield about
        if own:
            yield flag_table(own)


def paragraphs(text: str) -> str:
    """A docstring as Markdown: its lines joined, its indented commands as code."""
    parts = []
    for part in textwrap.dedent(text).strip().split("\n\n"):
        is_code = part.startswith("    ")
        parts.append(f"```sh\n{textwrap.dedent(part)}\n```" if is_code else " ".join(part.split()))
    return "\n\n".join(parts)


# configuration.md


def may_change(key: str, affects: Affects) -> str:
    """Whether a run that resumes may have another value of a key than it began with."""
    if key in DATA_FIELDS:
        return SAME_IMAGES
    if affects & Affects.WEIGHTS:
        return NO
    if key == settings.LENGTH:
        return NAMED
    return UNUSED if affects & Affects.TASK else YES


def field_rows(group: str, cls: type) -> Iterator[tuple[str, list[str]]]:
    """Key and row of each field of a group."""
    hints = typing.get_type_hints(cls, include_extras=True)
    texts = docstrings(cls)
    for field in fields(cls):
        key = f"{group}.{field.name}"
        kind = hints[field.name]
        own = [mark for mark in marks(kind) if isinstance(mark, Affects)]
        affects = own[0] if own else cls.affects  # type: ignore[attr-defined]
        name = f"`--{key.replace('_', '-')}`"
        if key in parsing.SHORT:
            name += f", `{parsing.SHORT[key]}`"
        text = texts.get(field.name) or BETAS.get(key, "")
        readers = kinds.readers(key)
        if readers and not any(re.search(rf"\b{word}\b", text) for word in re.split(r"\W+", readers)):
            text += f" Only with {readers}."
        yield key, [name, default_of(field), values(kind), may_change(key, affects), text.strip()]


BETAS = {
    "optim.beta_1": "AdamW: decay of the mean of gradients.",
    "optim.beta_2": "AdamW: decay of the mean of squared gradients.",
    "optim.weight_decay": "Decoupled weight decay.",
}
"""Fields whose name says it to those who know AdamW."""


def configuration() -> str:
    """configuration.md."""
    parts = [
        "# Configuration",
        NOTE,
        "Every field of a run's configuration. A field is a flag of `ddpm train` and `ddpm search`, a key "
        "of a checkpoint's `config.json`, and a parameter in MLflow. The defaults are those without a "
        "preset; [Presets](presets.md) lists what each preset sets. A value outside its range is refused "
        "before anything starts.",
        "A field of yes or no is switched on by `--data.horizontal-flip` and off by "
        "`--data.no-horizontal-flip`. A list has its values after the flag: `--model.width-multipliers 1 2 "
        "2`.",
        "## May a run change it when it resumes?",
        "The same command resumes a run. The column *resume* says what happens if the command has another "
        "value of the field:",
        table(
            ["resume", "what happens with another value"],
            [
                [YES, "The run resumes with the new value. Weights stay those of the same run."],
                [
                    NO,
                    "The field determines the weights. With `--name`, the command is refused, and the "
                    "message names the field; without it, the command starts another run.",
                ],
                [
                    NAMED,
                    "With `--name`, a larger value extends the run. Without it, the command starts another "
                    "run, since the learning rate may depend on the length.",
                ],
                [
                    SAME_IMAGES,
                    "The place may change, the images may not: a run resumes if the fingerprint of its "
                    "data is the same.",
                ],
                [
                    UNUSED,
                    "The field is read at the start of a new run. Without `--name`, it starts another run.",
                ],
            ],
        ),
        "The number of workers may change, too (`cluster.num_workers`): the global batches, their images "
        "and their noise stay the same; sums of floats, and so the weights, differ in the last bits.",
    ]
    groups = typing.get_type_hints(Config)
    for group, cls in groups.items():
        kind = type(getattr(Config(), group))
        parts.append(f"## {GROUP_TITLES[group]}")
        parts.append(" ".join((cls.__doc__ or "").split()))
        rows = [row for _, row in field_rows(group, kind)]
        parts.append(table(["flag", "default", "values", "resume", "what it does"], rows))
        if cls is ModelConfig:
            parts.append(
                "The fields up to `dropout` are those of every net, the others those of the U-Net. A net "
                "of an installed package has its own: `--model.net NAME --help-all` lists them."
            )
    return "\n\n".join(parts) + "\n"


# presets.md


def size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1e8 else f"{num_bytes / 1e6:,.0f} MB"


def count(value: float) -> str:
    if value < 1e6:
        return f"{value:,.0f}"
    return f"{value / 1e6:,.1f} M"


def preset_row(name: str, config: Config) -> list[str]:
    """A row of the table of sizes."""
    takes = footprint(replace(config, cluster=replace(config.cluster, num_workers=1)))
    assert takes.memory is not None, "our nets run on the meta device"
    model = config.model
    return [
        f"`{name}`",
        f"{model.image_size}x{model.image_size}, {'grey' if model.channels == 1 else 'colour'}",
        count(takes.weights),
        size(takes.checkpoint),
        size(takes.memory),
    ]


def length_row(name: str, config: Config) -> list[str]:
    """A row of the table of lengths."""
    train = config.train
    return [
        f"`{name}`",
        f"{train.batch_size} = {train.batch_size // train.micro_batch_size} x {train.micro_batch_size}",
        train.precision,
        count(train.total_images),
        f"{math.ceil(train.total_images / train.batch_size):,}",
    ]


def recipe_row(name: str, config: Config) -> list[str]:
    """A row of the table of recipes."""
    optim = config.optim
    sample = config.sample
    sampler = kinds.default_sampler("gaussian") if sample.sampler == kinds.AUTO else sample.sampler
    steps = sample.num_sample_steps or kinds.sampler(sampler).num_sample_steps
    rate = f"{optim.lr:g}, {optim.lr_schedule}"
    return [
        f"`{name}`",
        f"{config.schedule.kind}, T = {config.schedule.num_timesteps:,}",
        f"{config.objective.predict}, {config.objective.weight}",
        optim.kind,
        rate,
        f"{optim.ema_decay:g}",
        f"{sampler}, {steps} steps",
    ]


def images_per_s(page: str, labels: tuple[str, ...]) -> float:
    """The number after the first cells `labels` of a row in a page's tables."""
    for line in (FOLDER.parent.parent / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if tuple(cells[: len(labels)]) == labels:
            return float(cells[len(labels)].replace(",", ""))
    raise SystemExit(f"{page} has no row {labels}")


def time_rows() -> list[list[str]]:
    """The table of times; docs/design is computed, and benchmarks/ measured."""
    rows = []
    for name, (hardware, page, labels) in RATES.items():
        rate = images_per_s(page, labels)
        took = duration(presets.PRESETS[name].train.total_images / rate)
        is_measured = page.startswith("benchmarks/")
        how = "measured" if is_measured else "computed, not run"
        rows.append([f"`{name}`", hardware, f"{rate:,.0f}", took, f"[{how}](../../{page})"])
    return rows


def duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def preset_section(name: str, config: Config, defaults: Mapping[str, Any]) -> Iterator[str]:
    """What a preset sets."""
    yield f"## {name}"
    yield presets.ABOUT[name]
    rows = []
    for key, value in flatten(config).items():
        if value != defaults[key]:
            rows.append([f"`--{key.replace('_', '-')}`", shown(value), shown(defaults[key])])
    yield table(["field", "preset", "default"], rows)


def preset_page() -> str:
    """presets.md."""
    found = presets.PRESETS
    parts = [
        "# Presets",
        NOTE,
        "A preset is a configuration to start from; every flag changes it. `ddpm train PRESET` is all that "
        "a preset needs, `ddpm train folder PATH` for your own images.",
        "## Size",
        table(
            ["preset", "images", "weights", "a checkpoint", "memory of one worker"],
            [preset_row(name, config) for name, config in found.items()],
        ),
        "- `folder` chooses 8x8, 16x16 or 32x32 and grey or colour from the images; the row is 32x32 in "
        "colour.\n"
        "- A checkpoint has the weights, their averages (EMA) and the optimizer's state, in float32. Three "
        "are kept, and the best one.\n"
        "- The memory is computed: state, gradients and activations of one worker that takes the whole batch in one "
        "pass, in float32. bfloat16, several workers and `--train.forward-images` lower it. PyTorch and Ray take "
        "several hundred MB more.",
        "## Length",
        table(
            ["preset", "batch = micro-batches", "precision", "images in all", "steps"],
            [length_row(name, config) for name, config in found.items()],
        ),
        "A run has at most as many workers as a batch has micro-batches.",
        "## Recipe",
        table(
            [
                "preset",
                "noise schedule",
                "prediction, weight",
                "optimizer",
                "learning rate",
                "EMA decay",
                "sampler",
            ],
            [recipe_row(name, config) for name, config in found.items()],
        ),
        "## Time",
        table(["preset", "hardware", "images/s", "the whole preset", "source"], time_rows()),
        "The time is that of the steps alone. The start takes 10 to 20 seconds more, with Ray; "
        "checkpoints, samples and held-out metrics take the rest ([The start of a "
        "run](../../benchmarks/start.md), [Checkpoints](../../benchmarks/checkpoints.md)). `folder` has "
        "not been timed alone: in the race of [Time to quality](../../benchmarks/quality.md) it saw about "
        "67,000 images in 5 minutes.",
    ]
    defaults = flatten(Config())
    for name, config in found.items():
        parts.extend(preset_section(name, config, defaults))
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """The text of each page by its file name."""
    os.environ.pop("DDPM_STORAGE", None)
    found = {"commands.md": commands(), "configuration.md": configuration(), "presets.md": preset_page()}
    return {name: re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE) for name, text in found.items()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
