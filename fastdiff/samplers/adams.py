"""Linear multistep methods for the slope (x - d) / sigma: Adams-Bashforth in sigma, in ln sigma, and with equal steps.

All mix slopes of earlier calls, written as bases and estimates (`past_base`, `past`), so that clipping, masks and steering
of d act on them as in the step where they were made. For a flow the same methods run in t, where the slope is the velocity (`frame`).
"""

import math
from itertools import pairwise

import numpy as np

from ..noise import unknown
from .coefficients import check_points, lagrange_integrals, orders_of
from .euler import frame, runge_kutta
from .stage import Stage, d, past, past_base, x

__all__ = ["deis", "gradient_estimation", "ipndm", "lms", "multistep", "pndm"]

EQUAL_STEPS = ([1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
"""Adams-Bashforth for equal steps, orders 1 to 4."""


def multistep(sigmas, schedule, weights):
    """x' = x + sum_j b_j slope_j with b = weights(i, w), the levels w in the frame; b = None: x' = d."""
    to_frame, _ = frame(schedule)
    scales, levels = zip(*map(to_frame, sigmas))
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        b = weights(i, levels)
        if b is None:
            yield Stage(s, d, s_next, step=i)
            continue
        slopes = [(scales[i - j] * past_base(j) - past(j)) / levels[i - j] for j in range(len(b))]
        x_next = scales[i] * x + sum((c * slope for c, slope in zip(b, slopes)), 0.0 * x)
        yield Stage(s, x_next / scales[i + 1], s_next, step=i)


def lms(sigmas, *, schedule=None, order=4):
    """Adams-Bashforth with the steps as they are: the slope is a polynomial in sigma through the last `order` calls.

    k-diffusion's sample_lms and diffusers' LMSDiscreteScheduler, whose integrals are numerical; here they are exact.
    """
    orders = orders_of("lms", order, 4, len(sigmas) - 1, False)
    return multistep(sigmas, schedule, lambda i, w: lagrange_integrals(w[i - orders[i] + 1 : i + 1][::-1], w[i], w[i + 1]))


def ipndm(sigmas, *, schedule=None, order=4, final_denoise=True):
    """Improved PNDM (Zhang & Chen 2023, arXiv:2204.13902): Adams-Bashforth's weights for equal steps, lower orders at
    first, no Runge-Kutta start.

    final_denoise: the step to sigma = 0 ends at d (ComfyUI); False takes it as any other (diffusers' IPNDMScheduler).
    """
    orders = orders_of("ipndm", order, 4, len(sigmas) - 1, False)

    def weights(i, w):
        return None if final_denoise and w[i + 1] == 0 else [(w[i + 1] - w[i]) * c for c in EQUAL_STEPS[orders[i] - 1]]

    return multistep(sigmas, schedule, weights)


def deis(sigmas, *, schedule=None, order=3, variable="log_rho", lower_order_final=False, points=10_000):
    """DEIS (Zhang & Chen 2023, arXiv:2204.13902): the slope is a polynomial, and its integral over sigma is taken.

    variable: of the polynomial. "log_rho" is ln sigma, with exact integrals (diffusers' DEISMultistepScheduler); "t" is
    the time of a VP SDE with linear beta, from 0.001 at sigma = 0.002 to 1 at 80, with integrals as sums of `points` terms
    (tAB; ComfyUI's "tab"). `lms` is the paper's rho AB. A step to 0 ends at d. lower_order_final: the last steps fall to
    order 1, as in diffusers below 15 steps.
    """
    orders = orders_of("deis", order, 3, len(sigmas) - 1, lower_order_final)
    if variable not in ("log_rho", "t"):
        raise ValueError(unknown("variable", variable, ("log_rho", "t")))
    check_points(points)

    def weights(i, w):
        if w[i + 1] == 0:
            return None
        if variable == "t":
            return _sums_in_t(w[i - orders[i] + 1 : i + 1][::-1], w[i + 1], points) if orders[i] > 1 else [w[i + 1] - w[i]]
        u = [math.log(v) for v in w[i - orders[i] + 1 : i + 1][::-1]]
        return [w[i + 1] * c for c in lagrange_integrals(u, u[0], math.log(w[i + 1]), rate=1.0)]

    return multistep(sigmas, schedule, weights)


_BETA_SLOPE = 2 * (math.log1p(80.0**2) - math.log1p(0.002**2) / 1e-3) / (1 - 1e-3)
_BETA_MIN = math.log1p(80.0**2) - _BETA_SLOPE / 2  # ln(1 + sigma^2) = _BETA_MIN t + _BETA_SLOPE t^2 / 2


def _sums_in_t(levels, end, points):
    """For each level, newest first, the integral of l_j(t) dsigma/dt from the newest to `end`."""
    roots = (math.sqrt(_BETA_MIN**2 + 2 * _BETA_SLOPE * math.log1p(s**2)) for s in (*levels, end))
    *nodes, last = ((root - _BETA_MIN) / _BETA_SLOPE for root in roots)
    t = np.linspace(nodes[0], last, points)
    sigma = np.sqrt(np.expm1(_BETA_MIN * t + _BETA_SLOPE * t**2 / 2))
    rise = (1 + sigma**2) * (_BETA_MIN + _BETA_SLOPE * t) / (2 * sigma) * (last - nodes[0]) / points  # dsigma
    basis = (math.prod((t - u) / (v - u) for u in nodes if u != v) for v in nodes)
    return [float(np.sum(rise * l_j)) for l_j in basis]


def gradient_estimation(sigmas, *, schedule=None, gamma=2.0):
    """Gradient estimation (Permenter & Yuan 2024, arXiv:2306.04848): a step along gamma slope +
    (1 - gamma) slope_before, after a first Euler step; a step to 0 ends at d."""

    def weights(i, w):
        if w[i + 1] == 0:
            return None
        return [(w[i + 1] - w[i]) * c for c in ([gamma, 1 - gamma] if i else [1.0])]

    return multistep(sigmas, schedule, weights)


def pndm(sigmas, *, schedule, skip_prk=True):
    """PNDM (Liu et al. 2022, arXiv:2202.09778): Adams-Bashforth of order 4 for equal steps in eps, each step taken by
    DDIM's transfer, which is a step of sigma_t / alpha_t (of t, for a flow).

    skip_prk: it starts with a Heun step and lower orders (PLMS of Stable Diffusion: one call more than steps); else with
    three pseudo Runge-Kutta steps (four calls each), whose middle is half way in the schedule's time.
    """
    if not isinstance(skip_prk, bool):
        raise TypeError(f"skip_prk is {skip_prk!r}; it takes True or False")
    steps, to_frame = len(sigmas) - 1, frame(schedule)[0]
    if not skip_prk and steps < 4:
        raise ValueError(f"pndm with skip_prk=False takes 4 steps or more, the first 3 of them Runge-Kutta's; given {steps}")
    calls = [0]  # the call at the base of each step, counted from the first
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        if skip_prk and i == 0 and steps > 1:
            points, weights = [s, s_next], [1 / 2, 1 / 2]
        elif not skip_prk and i < 3:
            middle = float(schedule.sigma_ve((schedule.t(s) + schedule.t(s_next)) / 2))
            points, weights = [s, middle, middle, s_next], [1 / 6, 1 / 3, 1 / 3, 1 / 6]
        else:
            points, weights = [s], EQUAL_STEPS[min(i, 3)]
        if len(points) > 1:
            levels = [to_frame(point)[1] for point in points]
            tableau = [[0.0] * (j - 1) + [w - levels[0]] * (j > 0) for j, w in enumerate(levels)]
            whole = to_frame(s_next)[1] - levels[0]
            yield from runge_kutta(i, points, tableau, [whole * c for c in weights], s_next, to_frame)
        else:
            (a, w), (a_next, w_next) = to_frame(s), to_frame(s_next)
            x_next = a * x
            for j, c in enumerate(weights):
                ago, (a_then, w_then) = calls[i] - calls[i - j], to_frame(sigmas[i - j])
                x_next += c * (w_next - w) / w_then * (a_then * past_base(ago) - past(ago))
            yield Stage(s, x_next / a_next, s_next, step=i)
        calls.append(calls[-1] + len(points))
