"""Nets for others: diffusers, torch.export, MLflow's registry, serving; and the checkpoint that a name means."""
