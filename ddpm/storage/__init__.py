"""Folders and buckets, and locks in them."""
