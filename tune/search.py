"""Search noise schedule and learning rate: `ddpm search` in a checkout (ddpm/commands/search.py)."""

from ddpm import cli
from ddpm.commands.search import main

if __name__ == "__main__":
    cli.run(main)
