"""Export of nets (diffusers, torch.export), MLflow's registry, and resolution of names to checkpoints."""
