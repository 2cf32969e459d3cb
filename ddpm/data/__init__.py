"""Data sets of images: sources, shards, the order of reading, and reading itself."""
