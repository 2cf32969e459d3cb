"""Make a data set: `ddpm prepare` in a checkout (ddpm/cli/prepare.py)."""

from ddpm.cli.program import script

if __name__ == "__main__":
    script("prepare")
