"""What every job shares around its one library call: the command line, and user errors in one line."""

import argparse
import io
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from ddpm.config import kinds, presets
from ddpm.config.json import check_values, from_json, override
from ddpm.config.kinds import Choice
from ddpm.config.presets import Images, NetSize, PresetArguments
from ddpm.config.tree import Config
from ddpm.utils.errors import UserError
from ddpm.utils.exits import leave
from ddpm.utils.files import read_whole
from ddpm.utils.openmp import bound_spinning
from ddpm.utils.progress import printable, shortened

HELP = ("-h", "--help")
HELP_ALL = "--help-all"
SHORT = {
    "run.name": "--name",
    "run.storage": "--storage",
    "data.shards": "--data",
    "data.image_size": "--size",
    "data.autoencoder": "--autoencoder",
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
OTHER_NAMES = {
    "--epochs": "--total-images, which counts images, not passes",
    "--num-epochs": "--total-images, which counts images, not passes",
    "--learning-rate": "--lr",
    "--resolution": "--size",
    "--prediction-type": "--objective.predict",
    "--output-dir": "--storage, the folder of all runs, and --name",
    "--mixed-precision": "--train.precision",
    "--held-out-images": "--train.held-out-images, those measured in training; `ddpm prepare --test-images` holds out",
    "--data.held-out-images": "`ddpm prepare --test-images`, which holds images out",
}
"""Flags of a config that other trainers have, or that people expect, and those that exist."""
MAX_LINE = 500
"""Characters of an error's line; what is in the middle of a longer one is left out."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit: 0 (or what it returns) when done, 2 for a user error, 130 for Ctrl-C, 143 for SIGTERM.

    Output that cannot be written is dropped: a closed pipe or a full disk behind it does not end a job.
    """
    bound_spinning()
    # Ray, when it is imported: hide its warning that a node has many processes, most of which are idle in a search.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started")
    sys.stdout = _lossy(sys.stdout)
    sys.stderr = _lossy(sys.stderr)
    try:
        code = main() or 0
    except UserError as error:
        print(shortened(printable(f"error: {error}"), MAX_LINE), file=sys.stderr)
        code = error.exit_code
    except PermissionError as error:
        what = f"{error.filename}: {error.strerror}; make it accessible" if error.filename else str(error)
        print(printable(f"error: {what}"), file=sys.stderr)
        code = UserError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        code = 128 + signal.SIGTERM  # the handler that ray.init installs exits with 15 (Ray 2.60)
    leave(code)


def chosen(
    first: str,
    names: Mapping[str, str],
    description: str | None,
    field: str | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> str:
    """The first word of the command line; a request for help there prints what it may be, and exits the process.

    Args:
        first: what it is, for messages: "PRESET".
        names: its valid values, and a line about each.
        field: the field of ddpm.config.kinds.TABLES, if they are names of kinds.
        elsewhere: values that examples have, and how those are used.
    """
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in (*HELP, HELP_ALL):
        print(f"usage: {sys.argv[0]} {first} [flags]\n\n{description or ''}\n{first}:")
        for name, about in names.items():
            print(f"    {name:<15} {about}".rstrip())
        sys.exit(0)
    listed = ", ".join(names)
    if not word or word.startswith("-"):
        raise UserError(f"{first} is missing; the command line must begin with one of {listed}")
    if elsewhere and word in elsewhere:
        raise UserError(f"there is no {first} {word}; {elsewhere[word]}")
    if word not in names and field is not None:
        raise UserError(f"there is no {first} {word}; it must {kinds.expected(field, word)}")
    if word not in names:
        raise UserError(f"there is no {first} {word}; it must be one of {listed}")
    return word


def parse_preset(
    kind: type[PresetArguments], description: str | None, of_folder: Callable[[Images], Config]
) -> Any:
    """Parse the command line PRESET [flags] as `kind`.

    `folder PATH` and `folder --data URI` are the config `of_folder` of those images, and of the flags --size, --net and
    --autoencoder.
    """
    name = chosen("PRESET", presets.ABOUT, description, elsewhere=presets.EXAMPLES)
    words = sys.argv[2:]
    preset = presets.PRESETS[name]
    config = preset
    if name == "folder" and not {*HELP, HELP_ALL} & {*words}:
        path = words.pop(0) if words and not words[0].startswith("-") else None
        images = _images(path, words)
        if images.path is not None or images.shards is not None:
            config = of_folder(images)
            # What differs from the smallest choice is part of the run's name.
            preset = of_folder(Images(images.path, images.shards))
    own = {f"--{field.name.replace('_', '-')}" for field in fields(kind)}
    default = kind(name, starting_point(config))
    arguments = parse(kind, presets.ABOUT[name], words, default, own, SHOWN_FIRST)
    if arguments.net != "small" and name != "folder":
        raise UserError(f"--net {arguments.net} chooses the net of the preset folder; {name} has its own")
    return replace(arguments, base=preset)


def parse(
    kind: Any,
    description: str | None,
    words: Sequence[str] | None = None,
    default: Any = tyro.MISSING_NONPROP,
    taken: Collection[str] = (),
    shown: Collection[str] | None = None,
) -> Any:
    """Parse `words` (None: the command line) as `kind` with tyro; a request for help prints it and exits the process.

    Args:
        default: a `kind` of the values that are not given.
        taken: flags of `kind` itself, which a config's fields do not get as short names.
        shown: the keys of a config that --help shows; None: all.
    """
    words = sys.argv[1:] if words is None else words
    asks_for_help = bool({*HELP, HELP_ALL} & {*words})
    only = shown if asks_for_help and HELP_ALL not in words else None
    words = ["--help" if word == HELP_ALL else word for word in words]
    prog = " ".join(sys.argv[: len(sys.argv) - len(words)])
    registry = _registry(taken, only, asks_for_help)
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            arguments = tyro.cli(
                kind, prog=prog, description=description or "", args=words, default=default, registry=registry
            )
    except SystemExit as end:
        if end.code:
            raise UserError(_in_a_line(stderr.getvalue(), {} if shown is None else OTHER_NAMES)) from None
        if only:
            print(f"{HELP_ALL} lists every flag.")
        raise
    check_values(arguments)
    return arguments


def _registry(taken: Collection[str], only: Collection[str] | None, for_help: bool) -> ConstructorRegistry:
    """A registry with which tyro gives the fields of configs short names, and lists the names of kinds.

    They are no aliases of the fields themselves: an alias that is also a flag of the job is an error of tyro's.

    Args:
        taken: short names that no field gets.
        only: the keys of a config that help shows, in one list; None: all, group by group.
        for_help: whether help is shown, which lists the names of kinds, also of installed packages.
    """
    registry = ConstructorRegistry()
    groups = {Config: ""} | {kind: f"{name}." for name, kind in typing.get_type_hints(Config).items()}

    @registry.struct_rule
    def rule_of_group(info: StructTypeInfo) -> StructConstructorSpec | None:
        group = next((groups[kind] for kind in getattr(info.type, "__mro__", ()) if kind in groups), None)
        if not is_dataclass(info.type) or info.type in info.markers:
            return None
        # The marker is for this rule, which tyro asks again: then tyro's own rule answers.
        spec = ConstructorRegistry.get_struct_spec(replace(info, markers=(*info.markers, info.type)))
        if not isinstance(spec, StructConstructorSpec):
            return None
        changed = []
        for field in spec.fields:
            metavar = _metavar(field.type) if for_help else None
            if metavar is not None:
                shown: Any = Annotated[field.type, tyro.conf.arg(metavar=metavar)]
                field = replace(field, type=shown)
            if group is None:
                changed.append(field)
                continue
            key = f"{group}{field.name}"
            flag = None
            short = SHORT[key] if SHORT.get(key) not in (None, *taken) else ""
            if only is None:
                flag = tyro.conf.arg(aliases=[short] if short else None)
            elif not group:
                flag = tyro.conf.arg(name="")
            elif key in only:
                flag = tyro.conf.arg(name=short.removeprefix("--") or key)
            kind: Any = Annotated[field.type, tyro.conf.Suppress if flag is None else flag]
            changed.append(replace(field, type=kind))
        return replace(spec, fields=tuple(changed))

    return registry


def _metavar(kind: Any) -> str | None:
    """The names that help lists for a field of this type; None: it holds no name of a kind."""
    for mark in getattr(kind, "__metadata__", ()):
        if isinstance(mark, Choice):
            return "{" + ",".join(mark.names) + "}"
    inner = typing.get_args(kind)
    found = next(filter(None, map(_metavar, inner)), None)
    if found is not None and typing.get_origin(kind) is tuple:
        return f"[{found} [...]]"
    if found is not None and type(None) in inner:
        return found.replace("{", "{None,", 1)
    return found


def _in_a_line(box: str, other_names: Mapping[str, str]) -> str:
    """tyro's error message as one line, with the flags that it suggests. tyro has no errors but frames of text.

    Args:
        other_names: flags that do not exist, and what is suggested instead.
    """
    rows = [row.strip("│| ") for row in box.splitlines()[1:-1]]
    parts = re.split(r"^[─-]+$", "\n".join(rows), flags=re.MULTILINE)
    message, *more = filter(str.strip, parts)
    line = " ".join(message.split()).removeprefix("Error parsing ").removesuffix(".")
    if not line.startswith("Unrecognized"):
        return line
    typed = line.removeprefix("Unrecognized options: ").partition(",")[0].partition("=")[0].replace("_", "-")
    flags = dict.fromkeys(re.findall(r"^--[\w.-]+", more[0], re.MULTILINE)) if more else ()
    meant = other_names.get(typed) or " or ".join([*flags][:2])
    close = f" (did you mean {meant}?)" if meant else ""
    return f"{line}{close}; {HELP_ALL} lists every flag"


def _images(path: str | None, words: Sequence[str]) -> Images:
    """The images of the preset `folder`, and its flags, which are parsed again with all others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--data", "--data.shards", nargs="?", dest="shards")
    parser.add_argument("--size", "--data.image-size", nargs="?")
    parser.add_argument("--net", nargs="?")
    parser.add_argument("--autoencoder", "--data.autoencoder", nargs="?")
    typed = parser.parse_known_args(words)[0]
    size = int(typed.size) if typed.size is not None and typed.size.isdecimal() else None
    net: Any = (
        typed.net if typed.net in typing.get_args(NetSize) else "small"
    )  # a wrong one is an error of tyro's
    return Images(path, None if path else typed.shards, size, net, typed.autoencoder)


def starting_point(config: Config) -> Config:
    """The preset `config` with the changes of the --config file, and with the net of --model.net.

    Other flags are applied later; which flags exist depends on the net.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", nargs="?")
    parser.add_argument("--model.net", nargs="?", dest="net")
    typed = parser.parse_known_args()[0]
    if typed.config is not None:
        try:
            text = read_whole(Path(typed.config)).decode()
        except (OSError, ValueError) as error:
            raise UserError(f"--config {typed.config} cannot be read: {error}") from None
        config = from_json(text, typed.config, config)
    return config if typed.net is None else override(config, {"model.net": typed.net})


def _lossy(stream: TextIO | None) -> TextIO:
    """Wrap `stream` so that writing never fails."""
    if stream is None:  # closed before the job started
        return open(os.devnull, "w")
    try:
        number = stream.fileno()
    except OSError:  # a stream in memory
        return stream
    stream.flush()
    file = io.BufferedWriter(_LossyFile(number, "wb", closefd=False))
    return io.TextIOWrapper(
        file,
        encoding=stream.encoding,
        errors="backslashreplace",  # for characters that the terminal cannot show
        line_buffering=stream.isatty() or stream is sys.stderr,
    )


class _LossyFile(io.FileIO):
    """A file that drops what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written  # None: the write would block
