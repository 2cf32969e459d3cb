"""Search noise schedule and learning rate: `ddpm search` in a checkout (ddpm/cli/search.py)."""

from ddpm.cli import parsing
from ddpm.cli.search import main

if __name__ == "__main__":
    parsing.run(main)
