"""Show the runs in MLflow: `ddpm ui` in a checkout (ddpm/commands/ui.py)."""

from ddpm import cli
from ddpm.commands.ui import main

if __name__ == "__main__":
    cli.run(main)
