"""The diffusion Transformer (DiT) for small images."""
