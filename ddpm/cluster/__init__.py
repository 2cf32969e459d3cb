"""Joining a Ray cluster, its resources, and a pool of workers on it."""
