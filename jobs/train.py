"""Train a preset: `ddpm train` in a checkout (ddpm/cli/train.py)."""

from ddpm.cli import parsing
from ddpm.cli.train import main

if __name__ == "__main__":
    parsing.run(main)
