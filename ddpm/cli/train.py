"""Train a preset: ddpm train PRESET [--name N] [--data URI | --data.images FOLDER] [--storage URI] ...

The same command resumes its run. Without --name a run is named by its preset, and by what differs from it.
`ddpm train PRESET --help` lists common flags, `--help-all` every flag.
"""

from dataclasses import dataclass

from ddpm.cli import parsing
from ddpm.config.json import flatten
from ddpm.config.presets import PresetArguments
from ddpm.data.sources import folder_preset


@dataclass(frozen=True)
class TrainArguments(PresetArguments):
    """A preset and its changes, and whether to train."""

    dry_run: bool = False
    """Print the size of training, how long it takes and the configuration; start nothing."""


def main() -> int:
    arguments: TrainArguments = parsing.parse_preset(TrainArguments, __doc__, folder_preset.preset)

    from ddpm.training.launch import checked, launch  # after parsing, so that --help and errors come at once

    if not arguments.dry_run:
        result = launch(arguments)
        return 128 + result.signal if result.signal else 0
    config = checked(arguments)
    from ddpm.training import duration
    from ddpm.training.footprint import footprint

    print(f"net         {footprint(config)}")
    print(f"time        {duration.about(config)}", flush=True)
    for key, value in flatten(config).items():
        print(f"{key} = {value}")
    return 0
