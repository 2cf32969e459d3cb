"""Train a preset: `ddpm train` in a checkout (ddpm/cli/train.py)."""

from ddpm.cli.program import script

if __name__ == "__main__":
    script("train")
