"""Print a model card: `ddpm card` in a checkout (ddpm/cli/card.py)."""

from ddpm.cli.program import script

if __name__ == "__main__":
    script("card")
