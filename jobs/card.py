"""Print a model card: `ddpm card` in a checkout (ddpm/cli/card.py)."""

from ddpm.cli import parsing
from ddpm.cli.card import main

if __name__ == "__main__":
    parsing.run(main)
