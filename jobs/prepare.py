"""Make a data set: `ddpm prepare` in a checkout (ddpm/commands/prepare.py)."""

from ddpm import cli
from ddpm.commands.prepare import main

if __name__ == "__main__":
    cli.run(main)
