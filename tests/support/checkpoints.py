"""Names of checkpoints that tests look for."""

from ddpm.runs.run_folder import CheckpointName


def checkpoint_name(images_seen: int, generation: int = 1) -> str:
    """The name of the folder that a generation of workers, by default the first, stores."""
    return str(CheckpointName(images_seen, generation))
