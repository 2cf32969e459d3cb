"""Print a model card: `ddpm card` in a checkout (ddpm/commands/card.py)."""

from ddpm import cli
from ddpm.commands.card import main

if __name__ == "__main__":
    cli.run(main)
