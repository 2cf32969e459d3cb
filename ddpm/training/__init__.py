"""The training loop, what it carries, and where it runs."""
