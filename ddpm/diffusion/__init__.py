"""The mathematics of diffusion: schedules, process, objectives, samplers. Imports only torch.

A function checks what it is given: a ValueError names the parameter, its value, and what would be right.
"""
