"""The working folder of a Ray job, which Ray unpacks, names by a hash of its content, and removes later."""

import os
from pathlib import Path

from ddpm.runs.storage import HOME


def set_home(verbose: bool = False) -> None:
    """In a Ray job, make relative paths start from ~/ddpm, where the next submission finds what this one writes."""
    if "RAY_ADDRESS" not in os.environ or HOME in os.environ:
        return
    from ddpm.cluster import ray_init  # imported here: Ray takes seconds

    ray_init.connect(verbose)
    if Path.cwd().is_relative_to(ray_init.temp_dir()):
        os.environ[HOME] = str(Path.home() / "ddpm")
        print(
            f"folder      {os.environ[HOME]}: relative paths start here, since Ray removes this job's own folder; "
            "DDPM_STORAGE or --storage keeps runs elsewhere",
            flush=True,
        )
