"""Evaluate checkpoints: `ddpm evaluate` in a checkout (ddpm/cli/evaluate.py)."""

from ddpm.cli import parsing
from ddpm.cli.evaluate import main

if __name__ == "__main__":
    parsing.run(main)
