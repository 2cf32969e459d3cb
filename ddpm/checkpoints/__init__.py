"""The format of a checkpoint, and the folder of a run."""
