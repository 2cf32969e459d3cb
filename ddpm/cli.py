"""What every job shares around its one library call: the command line, and user errors in one line."""

import argparse
import difflib
import io
import itertools
import re
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from ddpm import presets
from ddpm.config import Config, merged, override
from ddpm.utils.errors import UserError
from ddpm.utils.openmp import bound_spinning
from ddpm.utils.progress import printable
from ddpm.utils.streams import lossy

CLOSE_NAME, CLOSE_FLAG = 0.5, 0.65
"""Smallest similarity, by difflib, at which a known word is suggested for an unknown one."""
HELP, HELP_ALL = ("-h", "--help"), "--help-all"
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
"""Other trainers' names of flags, for messages; here training length is counted in images."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit: 0 (or what it returns) when done, 2 for a user error, 130 for Ctrl-C.

    Output that cannot be written is dropped: a closed pipe or a full disk behind it does not end a job.
    """
    bound_spinning()
    sys.stdout, sys.stderr = lossy(sys.stdout), lossy(sys.stderr)
    try:
        code = main() or 0
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def parse_preset(kind: type[Any], description: str | None) -> Any:
    """Parse the command line PRESET [flags] as `kind`, whose first fields are the preset's name and its config.

    Raises:
        UserError: the command line is invalid.
    """
    defaults = {name: kind(name, config) for name, config in starting_points().items()}
    presets_or_flags = tyro.extras.subcommand_type_from_defaults(defaults, presets.ABOUT)
    own = {f"--{field.name.replace('_', '-')}" for field in fields(kind)}
    return parse(presets_or_flags, description, "PRESET", list(defaults), own, SHOWN_FIRST)


def parse(
    kind: Any,
    description: str | None,
    first: str = "",
    names: Sequence[str] = (),
    taken: Collection[str] = (),
    shown: Collection[str] | None = None,
) -> Any:
    """Parse the command line as `kind` with tyro; a request for help prints it and exits the process.

    Args:
        first: name of the first word in messages; `names` are its valid values.
        taken: flags of `kind` itself, which a config's fields do not get as short names.
        shown: the keys of a config that --help shows; None: all.

    Raises:
        UserError: the command line is invalid.
    """
    words = sys.argv[1:]
    only = shown if {*HELP} & {*words} and HELP_ALL not in words else None
    words = ["--help" if word == HELP_ALL else word for word in words]
    if first:
        _check_first(words, first, names)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            found, unknown = tyro.cli(
                kind,
                args=words,
                description=description,
                registry=_registry(taken, only),
                return_unknown_args=True,
            )
    except SystemExit as end:
        if end.code:
            raise UserError(_in_a_line(said.getvalue())) from None
        if only:
            print(f"{HELP_ALL} lists every flag.")
        raise
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        known = _flags(kind, words[:1] if first else [], taken)
        raise UserError(
            f"there is no flag {word}{_did_you_mean(word, known, CLOSE_FLAG)}; {HELP_ALL} lists every flag"
        )
    return found


def _registry(taken: Collection[str] = (), only: Collection[str] | None = None) -> ConstructorRegistry:
    """A registry with which tyro gives the fields of configs short names.

    The rule changes the result of tyro's own rules; while it calls them, `asked` disables the rule itself.

    Args:
        taken: short names that no field gets.
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

    return made


def _check_first(words: Sequence[str], first: str, names: Sequence[str]) -> None:
    """Raise UserError unless the command line begins with one of `names`, or asks for help."""
    word, listed = words[0] if words else "", ", ".join(names)
    if word in names or word.startswith((*HELP, "--tyro-")):  # tyro's shell completions
        return
    if not word or word.startswith("-"):
        raise UserError(f"{first} is missing; the command line must begin with one of {listed}")
    raise UserError(
        f"there is no {first} {word}{_did_you_mean(word, names, CLOSE_NAME)}; it must be one of {listed}"
    )


def _did_you_mean(word: str, known: Sequence[str], cutoff: float) -> str:
    """Part of a message: the one or two of `known` that are most similar to `word`."""
    word = word.replace("_", "-")
    elsewhere = [name for name in known if name == OTHER_TRAINERS.get(word.lstrip("-"))]
    same_end = [name for name in known if "." in name and name.rpartition(".")[2] == word.lstrip("-")]
    close = elsewhere or same_end or difflib.get_close_matches(word, known, n=2, cutoff=cutoff)
    return f" (did you mean {' or '.join(close[:2])}?)" if close else ""


def _flags(kind: Any, before: Sequence[str], taken: Collection[str]) -> list[str]:
    """Every flag that tyro's help lists."""
    shown = io.StringIO()
    with suppress(SystemExit), redirect_stdout(shown):
        tyro.cli(kind, args=[*before, "--help"], registry=_registry(taken))
    return [*dict.fromkeys(re.findall(r"--[a-z][\w.-]*", shown.getvalue()))]


def _in_a_line(box: str) -> str:
    """tyro's error message as one line, without its frame and the help below it."""
    rows = [row.strip("│| ").strip("─") for row in box.splitlines()[1:]]  # the first is a title
    rows = [row if row.strip("-") else "" for row in rows]
    body = itertools.takewhile(bool, itertools.dropwhile(lambda row: not row, rows))
    said = " ".join(" ".join(body).split())
    return said.removeprefix("Error parsing ").removesuffix(".")


def starting_points() -> dict[str, Config]:
    """The presets, each with the changes of the --config file, and with the net of --model.net.

    Other flags are applied later; which flags exist depends on the net.

    Raises:
        UserError: the file cannot be read or is not a config, or the net is unknown.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", nargs="?")
    parser.add_argument("--model.net", nargs="?", dest="net")
    typed, found = parser.parse_known_args()[0], presets.PRESETS
    if typed.config is not None:
        try:
            text = Path(typed.config).read_text()
        except (OSError, ValueError) as error:
            raise UserError(f"--config {typed.config} cannot be read: {error}") from None
        found = {name: merged(preset, text, typed.config) for name, preset in found.items()}
    if typed.net is not None:
        found = {name: override(preset, {"model.net": typed.net}) for name, preset in found.items()}
    return found
