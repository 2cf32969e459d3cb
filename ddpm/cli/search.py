"""Search noise schedule and learning rate: ddpm search PRESET [--num-trials 16] [--max-concurrent 2] ...

Each trial is a run in the folder STORAGE/NAME. Trials are ranked by the variational bound of held-out images, in
bits/dim, with the same images and noise for all; the best few also by KID. The same command continues the search.
`ddpm search PRESET --help` lists common flags, `--help-all` every flag. Flags of the preset apply to every trial.
"""

from ddpm.cli import parsing
from ddpm.data.sources import folder_preset
from ddpm.search.config import Arguments


def main() -> int:
    chosen: Arguments = parsing.parse_preset(Arguments, __doc__, folder_preset.preset)

    from ddpm.data import plan  # after parsing, so that --help and errors come at once

    plan.check_batches(chosen.config)

    from ddpm.cluster import job_folder  # seconds: PyTorch, Ray
    from ddpm.search.driver import run_search

    job_folder.set_home(chosen.verbose)
    return run_search(chosen)
