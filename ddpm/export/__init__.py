"""Export of nets: the formats of diffusers, both ways, and model cards."""
