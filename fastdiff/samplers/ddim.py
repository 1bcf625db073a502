"""DDPM, DDIM and LCM: samplers of VP models, in VE coordinates."""

import math
from itertools import pairwise

from ..noise import unknown
from .euler import ancestral_step, euler_step
from .path import takes_path
from .stage import Linear, Stage, d, noise, raw, x

__all__ = ["ddim", "ddpm", "lcm"]


@takes_path
def ddim(sigmas, *, eta=0.0, s_noise=1.0, use_clipped_model_output=True):
    """Song et al. 2021 (DDIM), eq. 12: x0 plus the direction back to x_t plus noise.

    In VE coordinates eq. 16's sigma_t is eta sigma' sqrt(1 - sigma'^2/sigma^2), so that this is `euler_ancestral`.
    use_clipped_model_output=False, diffusers' default, takes the direction from the estimate as it was before it was
    clipped or steered.
    """
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = ancestral_step(s, s_next, eta)
        x_next = euler_step(x, s, down) if use_clipped_model_output else d + down / s * (x - raw)
        yield Stage(s, x_next + noise("step", i, s_noise * up), s_next, step=i)


@takes_path
def ddpm(sigmas, *, schedule, variance="fixed_small"):
    """Ho et al. 2020, eq. 7: the mean of q(x' | x, x0), noise of variance beta~ (fixed_small) or beta (fixed_large)."""
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(unknown("variance", variance, ("fixed_small", "fixed_large")))
    if variance == "fixed_large" and schedule.kind != "vp":
        raise ValueError(f"variance='fixed_large' goes with a VP schedule; given was {schedule!r}")
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = ancestral_step(s, s_next)
        if variance == "fixed_large" and s_next > 0:
            # beta = 1 - alpha_bar / alpha_bar', and alpha_bar = 1 / (1 + sigma^2); divided by alpha_bar' for VE
            up = math.sqrt((1 + s_next**2) * (s**2 - s_next**2) / (1 + s**2))
        yield Stage(s, euler_step(x, s, down) + noise("step", i, up), s_next, step=i)


def lcm(sigmas, *, schedule, timestep_scaling=None, sigma_data=0.5, s_noise=1.0):
    """Latent consistency sampling (Luo et al. 2023, algorithm 3): to the estimate of x0, back up with fresh noise.

    timestep_scaling: None takes d as it is (ComfyUI); a number puts the boundary condition c_skip x_t + c_out d of
    consistency models around it, at timestep * timestep_scaling (10 in diffusers).
    """
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        estimate = d
        if timestep_scaling is not None:
            scaled = schedule.time(s, "timestep") * timestep_scaling
            c_skip, c_out = (sigma_data / math.hypot(scaled, sigma_data)) ** 2, scaled / math.hypot(scaled, sigma_data)
            estimate = c_skip * float(schedule.alpha_at(s)) * x + c_out * d
        yield Stage(s, Linear(estimate) + noise("step", i, s_noise * s_next), s_next, step=i)
