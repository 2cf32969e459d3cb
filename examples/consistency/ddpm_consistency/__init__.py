"""Consistency tuning: an objective that tunes a trained net, and the sampler of one or two steps for it."""
