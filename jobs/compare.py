"""Compare runs on one page: `ddpm compare` in a checkout (ddpm/cli/compare.py)."""

from ddpm.cli import parsing
from ddpm.cli.compare import main

if __name__ == "__main__":
    parsing.run(main)
