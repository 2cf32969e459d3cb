"""Export a net: `ddpm export` in a checkout (ddpm/cli/export.py)."""

from ddpm.cli.program import script

if __name__ == "__main__":
    script("export")
