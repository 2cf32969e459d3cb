"""Runs: folders and buckets, checkpoints, a run folder with its curves and evaluations, its lock, names of runs."""
