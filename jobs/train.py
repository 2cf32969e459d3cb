"""Train a preset: `ddpm train` in a checkout (ddpm/commands/train.py)."""

from ddpm import cli
from ddpm.commands.train import main

if __name__ == "__main__":
    cli.run(main)
