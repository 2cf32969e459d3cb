"""Latents: the images of an autoencoder, with more channels and a shorter side, on which a net can train instead."""
