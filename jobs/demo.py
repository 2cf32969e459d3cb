"""Show nets in the browser: `ddpm demo` in a checkout (ddpm/commands/demo.py)."""

from ddpm import cli
from ddpm.commands.demo import main

if __name__ == "__main__":
    cli.run(main)
