"""A solver that fastdiff does not ship, written as stages: what diffusers makes of one that it does."""

import math
from itertools import pairwise

from fastdiff.samplers.stage import Stage, d, noise, past, x

__all__ = ["diffusers_3m_sde"]


def diffusers_3m_sde(sigmas):
    """`dpmpp_3m_sde` with the weight of d2 that diffusers 0.42 has: (1 - e^-H - H)/H^2 - 1/2 with H = 2h.

    k-diffusion has (1 - e^-H - H)/H^2 + 1/2 = -phi_3(H), half of the exact integral of the quadratic term.
    """
    hs = []
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        if s_next == 0:
            yield Stage(s, d, 0.0, step=i)
            continue
        h = math.log(s / s_next)
        H = 2 * h
        x_next = math.exp(-H) * x - math.expm1(-H) * d + noise("step", i, s_next * math.sqrt(-math.expm1(-H)))
        phi = math.expm1(-H) / H + 1
        if len(hs) > 1:
            r0, r1 = hs[-1] / h, hs[-2] / h
            a, b = (d - past(1)) / r0, (past(1) - past(2)) / r1
            x_next += phi * (a + (a - b) * (r0 / (r0 + r1))) + ((-math.expm1(-H) - H) / H**2 - 0.5) / (r0 + r1) * (
                a - b
            )
        elif hs:
            x_next += phi * (d - past(1)) * (h / hs[-1])
        yield Stage(s, x_next, s_next, step=i)
        hs.append(h)
