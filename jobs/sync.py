"""Send a run to MLflow: `ddpm sync` in a checkout (ddpm/commands/sync.py)."""

from ddpm import cli
from ddpm.commands.sync import main

if __name__ == "__main__":
    cli.run(main)
