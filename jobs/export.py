"""Export a net: `ddpm export` in a checkout (ddpm/cli/export.py)."""

from ddpm.cli import parsing
from ddpm.cli.export import main

if __name__ == "__main__":
    parsing.run(main)
