"""Export a net: `ddpm export` in a checkout (ddpm/commands/export.py)."""

from ddpm import cli
from ddpm.commands.export import main

if __name__ == "__main__":
    cli.run(main)
