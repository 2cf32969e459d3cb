"""Evaluate checkpoints: `ddpm evaluate` in a checkout (ddpm/cli/evaluate.py)."""

from ddpm.cli.program import script

if __name__ == "__main__":
    script("evaluate")
