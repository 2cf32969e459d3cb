"""Search noise schedule and learning rate: `ddpm search` in a checkout (ddpm/cli/search.py)."""

from ddpm.cli.program import script

if __name__ == "__main__":
    script("search")
