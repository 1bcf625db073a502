"""Few-step samplers of distilled models: a jump to an estimate, and fresh noise back up. (LCM: `ddim.lcm`.)"""

import math
from itertools import pairwise

from .ddim import lcm
from .euler import euler_step
from .stage import Linear, Stage, d, noise, x

__all__ = ["consistency", "scm", "tcd"]


def tcd(sigmas, *, schedule, eta=0.3, s_noise=1.0):
    """Trajectory consistency distillation (Zheng et al. 2024, arXiv:2402.19159): an Euler step, which the model
    was trained to make exact, to the time (1 - eta) t', and noise up to t'; down to a whole timestep where t' is one.

    eta: the paper's gamma; 0 is DDIM, 1 is multistep consistency sampling.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta of tcd is {eta}; it takes 0 <= eta <= 1")
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down = s_next
        if s_next > 0 and eta > 0:
            t_next = float(schedule.t(s_next))
            t = (1 - eta) * t_next
            whole = schedule.kind == "vp" and t_next.is_integer()
            down = min(s_next, float(schedule.sigma_ve(math.floor(t) if whole else t)))
        up = math.sqrt(max(s_next**2 - down**2, 0.0))
        yield Stage(s, euler_step(x, s, down) + noise("step", i, s_noise * up), s_next, step=i)


def scm(sigmas, *, sigma_data=0.5):
    """Multistep sampling of TrigFlow consistency models (Lu & Song 2024, arXiv:2410.11081; sCM of Sana-Sprint).

    TrigFlow has x_t = cos(t) x0 + sin(t) z with z of standard deviation sigma_data: a VP schedule at sigma = tan(t), whose
    model predicts v. The noise that a run starts from has sigma_data too: start="latent", with sigma_data N.
    """
    return lcm(sigmas, schedule=None, s_noise=sigma_data)


def consistency(sigmas, *, sigma_min=0.002, sigma_data=0.5, boundary=True, s_noise=1.0):
    """Consistency models, multistep (Song et al. 2023, arXiv:2303.01469, algorithm 1): to the estimate f, and noise of
    variance sigma'^2 - sigma_min^2 (none below sigma_min).

    boundary: d is EDM's (prediction="edm"), and f = c_skip x + c_out F has the boundary condition at sigma_min (appendix
    C); False takes d as f.
    """
    if not 0 <= sigma_min < math.inf:
        raise ValueError(f"sigma_min is {sigma_min}; it takes a finite number >= 0")
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        estimate = Linear(d)
        if boundary:
            at_min = (s - sigma_min) / s  # c_out over EDM's
            c_skip = sigma_data**2 / ((s - sigma_min) ** 2 + sigma_data**2)
            estimate = (c_skip - at_min * sigma_data**2 / (s**2 + sigma_data**2)) * x + at_min * d
        up = math.sqrt(max(s_next**2 - sigma_min**2, 0.0))
        yield Stage(s, estimate + noise("step", i, s_noise * up), s_next, step=i)
