"""Compare runs on one page: `ddpm compare` in a checkout (ddpm/commands/compare.py)."""

from ddpm import cli
from ddpm.commands.compare import main

if __name__ == "__main__":
    cli.run(main)
