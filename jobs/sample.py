"""Sample images from a checkpoint: `ddpm sample` in a checkout (ddpm/cli/sample.py)."""

from ddpm.cli.program import script

if __name__ == "__main__":
    script("sample")
