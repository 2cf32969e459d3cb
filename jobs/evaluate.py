"""Evaluate checkpoints: `ddpm evaluate` in a checkout (ddpm/commands/evaluate.py)."""

from ddpm import cli
from ddpm.commands.evaluate import main

if __name__ == "__main__":
    cli.run(main)
