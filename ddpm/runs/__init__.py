"""Runs: folders and buckets, the checkpoint format, a run folder with its curves, its lock, and names of runs."""
