"""Send a run to MLflow: `ddpm sync` in a checkout (ddpm/cli/sync.py)."""

from ddpm.cli import parsing
from ddpm.cli.sync import main

if __name__ == "__main__":
    parsing.run(main)
