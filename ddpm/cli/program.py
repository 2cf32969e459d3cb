"""The program `ddpm`, whose commands are one module each. `python jobs/train.py` is `ddpm train` in a checkout."""

import importlib
import sys
from importlib.metadata import version
from typing import NoReturn

from ddpm.cli import parsing

COMMANDS = {
    "train": "train a preset, or resume a run",
    "sample": "sample images from a run",
    "evaluate": "bits/dim, KID, FID and more, with standard errors",
    "compare": "runs side by side on one page",
    "search": "search noise schedule and learning rate",
    "prepare": "make a data set of shards",
    "encode": "make a data set of latents from one of images",
    "export": "export a net for diffusers",
    "card": "write a net's model card",
    "sync": "send a run to MLflow",
    "ui": "show the runs in MLflow",
}
DESCRIPTION = """Train, sample and compare denoising diffusion models on Ray.

    ddpm train digits               a data set that is built in
    ddpm train folder PHOTOS        a folder of images

The pages are in the folder docs of the repository; docs/quickstart.md is the first.
"""
EXAMPLES = {"demo": "it is an example: python examples/demo/demo.py RUN"}
"""Programs that are no commands, and how they are run."""


def main() -> NoReturn:
    """The program `ddpm`."""
    if sys.argv[1:] == ["--version"]:
        print(f"ddpm-on-ray {version('ddpm-on-ray')}")
        sys.exit(0)
    parsing.run(_command)


def script(name: str) -> NoReturn:
    """A command as a script of a checkout, which is what `ray job submit` runs: it is `ddpm NAME`."""
    sys.argv[1:1] = [name]
    parsing.run(_command)


def _command() -> int | None:
    sys.argv[0] = "ddpm"
    name = parsing.chosen("COMMAND", COMMANDS, DESCRIPTION, elsewhere=EXAMPLES)
    sys.argv[:2] = [f"ddpm {name}"]
    code: int | None = importlib.import_module(f"ddpm.cli.{name}").main()
    return code
