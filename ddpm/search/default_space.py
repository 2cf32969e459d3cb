"""What a search varies by default; --space replaces all of it:

    --space 'optim.lr=log(1e-5,1e-2)' 'schedule.kind=linear|cosine' 'schedule.num_timesteps=int(200,1000)'

    a|b|c               one of these; a single value fixes it
    uniform(low,high)   uniform between the bounds
    log(low,high)       uniform in the logarithm; low must be above 0
    int(low,high)       whole numbers, both ends included; intlog(low,high) is uniform in the logarithm

A key that only some kinds read is varied only where one of them was chosen: a cosine has no beta_end.
Nothing in a flag is executed.
"""

from ddpm.config.kinds import SCHEDULES

DEFAULT = (
    f"schedule.kind={'|'.join(SCHEDULES)}",
    "schedule.num_timesteps=int(200,1000)",  # the bound gets tighter with T, and more expensive to compute
    "schedule.beta_start=log(1e-5,1e-3)",  # 1e-4 in Ho et al. 2020; 8.5e-4 in Stable Diffusion (scaled_linear)
    # At T = 1000, linear from 1e-4: from too little noise (sqrt(alpha_bar_T) = 0.28) to noise far too early.
    "schedule.beta_end=log(0.005,0.1)",
    "schedule.cosine_s=log(1e-3,0.1)",  # 0.008 in Nichol & Dhariwal 2021
    "schedule.sigmoid_start=uniform(-6,-0.5)",  # Chen 2023 tries (-3, 3), (0, 3) and (-3, 0) among others
    "schedule.sigmoid_end=uniform(0.5,6)",
    "optim.lr=log(1e-4,1e-2)",
)
