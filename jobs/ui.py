"""Show the runs in MLflow: `ddpm ui` in a checkout (ddpm/cli/ui.py)."""

from ddpm.cli.program import script

if __name__ == "__main__":
    script("ui")
