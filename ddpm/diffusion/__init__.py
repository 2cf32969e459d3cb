"""The mathematics of diffusion: schedules, process, objectives, samplers. torch and nothing else."""
