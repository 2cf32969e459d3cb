"""The configuration: a tree of frozen dataclasses, its JSON, the kinds that its names select, and presets."""
