"""Denoising diffusion models for images, trained on a Ray cluster."""
