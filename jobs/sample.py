"""Sample images from a checkpoint: `ddpm sample` in a checkout (ddpm/commands/sample.py)."""

from ddpm import cli
from ddpm.commands.sample import main

if __name__ == "__main__":
    cli.run(main)
