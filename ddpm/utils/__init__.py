"""Helpers for every layer: images, seeds, random generators, files, retries, progress, errors."""
