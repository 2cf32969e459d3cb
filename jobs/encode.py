"""Encode a data set of images: `ddpm encode` in a checkout (ddpm/cli/encode.py)."""

from ddpm.cli.program import script

if __name__ == "__main__":
    script("encode")
