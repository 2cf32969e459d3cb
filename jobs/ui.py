"""Show the runs in MLflow: `ddpm ui` in a checkout (ddpm/cli/ui.py)."""

from ddpm.cli import parsing
from ddpm.cli.ui import main

if __name__ == "__main__":
    parsing.run(main)
