"""Make a data set: `ddpm prepare` in a checkout (ddpm/cli/prepare.py)."""

from ddpm.cli import parsing
from ddpm.cli.prepare import main

if __name__ == "__main__":
    parsing.run(main)
