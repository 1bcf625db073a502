"""Time grids: at which noise levels a sampler stops.

Each function takes a schedule and a number of steps and returns sigma_ve (steps + 1,), decreasing. The last level is 0
(final="zero"), or the schedule's least level (final="sigma_min", as DDIM with set_alpha_to_one=False in diffusers).

Grids over a table (leading, trailing, linspace, sgm_uniform, simple, ddim_uniform, beta) count in timesteps: those of a
VP schedule; t = 1/1000 .. 1 of a flow; 1000 levels between sigma_min and sigma_max, uniform in ln sigma, for EDM.
"""

import math

import numpy as np

from .noise import unknown

__all__ = ["GRIDS"]


def karras(schedule, steps, sigma_min=None, sigma_max=None, rho=7.0, final="zero"):
    """Karras et al. 2022, eq. 5: uniform in sigma^(1/rho)."""
    low, high = _range(schedule, sigma_min, sigma_max)
    if not (np.isfinite(rho) and rho > 0):
        raise ValueError(f"rho is {rho}; it takes a finite number > 0")
    ramp = np.linspace(0, 1, steps)
    return _end(schedule, (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho, final)


def exponential(schedule, steps, sigma_min=None, sigma_max=None, final="zero"):
    """Uniform in ln sigma, which is the log SNR of DPM-Solver (Lu et al. 2022)."""
    return polyexponential(schedule, steps, sigma_min, sigma_max, 1.0, final)


def polyexponential(schedule, steps, sigma_min=None, sigma_max=None, rho=1.0, final="zero"):
    """A power of a ramp in ln sigma (k-diffusion)."""
    low, high = _range(schedule, sigma_min, sigma_max)
    ramp = np.linspace(1, 0, steps) ** rho
    return _end(schedule, np.exp(ramp * math.log(high / low) + math.log(low)), final)


def uniform(schedule, steps, final="zero"):
    """Flow times 1, 1 - 1/steps, ..., 0, shifted (FLUX)."""
    if schedule.kind != "flow":
        raise ValueError(f"grid 'uniform' goes with a flow schedule; given was {schedule!r}")
    return _end(schedule, schedule.sigma_ve(schedule.shifted(1 - np.arange(steps) / steps)), final)


def leading(schedule, steps, offset=0, final="zero"):
    """0, k, 2k, ... with k = T // steps (DDIM; diffusers' timestep_spacing="leading", offset = steps_offset)."""
    T = _table(schedule, steps)
    return _at(schedule, np.arange(steps)[::-1] * (T // steps) + offset, final)


def trailing(schedule, steps, final="zero"):
    """T - 1, T - 1 - T/steps, ...: starts at the noisiest timestep (Lin et al. 2023, table 2)."""
    T = _table(schedule, steps)
    return _at(schedule, np.rint(T - np.arange(steps) * (T / steps)) - 1, final)


def linspace(schedule, steps, rounded=False, final="zero"):
    """From T - 1 to 0 evenly; `rounded` to whole timesteps as DDIM and DDPM do, fractional as Euler does."""
    t = np.linspace(_table(schedule, steps) - 1, 0, steps)
    return _at(schedule, np.rint(t) if rounded else t, final)


def sgm_uniform(schedule, steps, final="zero"):
    """From T - 1 towards 0 in equal steps, without 0 itself (Stability AI's generative-models)."""
    return _at(schedule, np.linspace(_table(schedule, steps) - 1, 0, steps + 1)[:-1], final)


def simple(schedule, steps, final="zero"):
    """Every (T/steps)-th entry of the table, counted from its noisy end (ComfyUI)."""
    T = _table(schedule, steps)
    return _at(schedule, T - 1 - np.floor(np.arange(steps) * (T / steps)), final)


def ddim_uniform(schedule, steps, final="zero"):
    """1, 1 + k, 1 + 2k, ... with k = T // steps, as many as there are (ComfyUI): may have more than `steps` steps."""
    T = _table(schedule, steps)
    return _at(schedule, np.arange(1, T, max(T // steps, 1))[::-1], final)


def beta(schedule, steps, a=0.6, b=0.6, final="zero"):
    """Quantiles of a Beta distribution of timesteps (Lee et al. 2024, "Beta sampling is all you need")."""
    from scipy import stats

    return _at(schedule, stats.beta.ppf(1 - np.arange(steps) / steps, a, b) * (_table(schedule, steps) - 1), final)


GRIDS = {
    f.__name__: f
    for f in (
        karras,
        exponential,
        polyexponential,
        uniform,
        leading,
        trailing,
        linspace,
        sgm_uniform,
        simple,
        ddim_uniform,
        beta,
    )
}


def _range(schedule, low, high):
    low = schedule.sigma_min if low is None else low
    high = schedule.sigma_max if high is None else high
    if not 0 < low < high < math.inf:
        raise ValueError(f"sigma_min={low}, sigma_max={high}; it takes 0 < sigma_min < sigma_max < inf")
    if high >= 1e6:
        raise ValueError(
            f"sigma_max is {high:g}, pure noise, where a grid in powers or logarithms of sigma has no start; "
            "it takes sigma_max below 1e6 (t = 0.999 of a flow is sigma_max=999)"
        )
    return low, high


def _end(schedule, sigmas, final):
    if final not in ("zero", "sigma_min"):
        raise ValueError(unknown("final", final, ("zero", "sigma_min")))
    return np.append(sigmas, 0.0 if final == "zero" else schedule.sigma_min)


def _table(schedule, steps) -> int:
    T = schedule.timesteps if schedule.kind == "vp" else 1000
    if steps > T:
        raise ValueError(f"steps is {steps}; a grid over the {T} timesteps of {schedule!r} takes at most {T}")
    return T


def _at(schedule, t, final):
    """sigma_ve at places of the table, fractional ones too."""
    t = np.asarray(t, np.float64)
    if schedule.kind == "flow":
        sigmas = schedule.sigma_ve(schedule.shifted((t + 1) / 1000))
    elif schedule.kind == "vp":
        sigmas = schedule.sigma_ve(t)
    else:
        sigmas = np.exp(math.log(schedule.sigma_min) + t / 999 * math.log(schedule.sigma_max / schedule.sigma_min))
    return _end(schedule, sigmas, final)
