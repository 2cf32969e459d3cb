"""Compare runs on one page: `ddpm compare` in a checkout (ddpm/cli/compare.py)."""

from ddpm.cli.program import script

if __name__ == "__main__":
    script("compare")
