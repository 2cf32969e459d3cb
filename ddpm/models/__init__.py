"""The networks, and their averaged weights. torch and nothing else."""
