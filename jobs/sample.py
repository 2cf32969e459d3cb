"""Sample images from a checkpoint: `ddpm sample` in a checkout (ddpm/cli/sample.py)."""

from ddpm.cli import parsing
from ddpm.cli.sample import main

if __name__ == "__main__":
    parsing.run(main)
