"""Export of nets (diffusers, torch.export), MLflow's registry, serving, and resolution of names to checkpoints."""
