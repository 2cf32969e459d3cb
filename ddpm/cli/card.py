"""Print a model card for Hugging Face: ddpm card RUN > README.md

It names the data and their licence, the training, and the scores that ddpm evaluate left in the run's folder.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm.cli import parsing


@dataclass(frozen=True)
class Arguments:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder or URI of a run, or builtin:NAME."""


def main() -> None:
    arguments: Arguments = parsing.parse(Arguments, __doc__)
    from ddpm.export import card

    print(card.card(arguments.run))
