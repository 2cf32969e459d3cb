"""The mathematics of diffusion: schedules, process, objectives, samplers. Imports only torch."""
