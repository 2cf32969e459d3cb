"""Sampling of images on one process or many, and the files they are written to."""
