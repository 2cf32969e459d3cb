"""Send a run to MLflow: `ddpm sync` in a checkout (ddpm/cli/sync.py)."""

from ddpm.cli.program import script

if __name__ == "__main__":
    script("sync")
