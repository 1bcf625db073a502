"""ComfyUI's own formulas, as stages: CFG++, the ancestral steps of a flow, iPNDM with the steps as they are.

CFG++ (Chung et al. 2024, arXiv:2406.08070) moves along the noise of the unconditional estimate u. u and, where a formula needs
it, the base of an earlier call are tensors that are there anyway: a row takes them as inputs, addressed like noise.
"""

import math
from itertools import pairwise

from ..samplers import adams
from ..samplers.coefficients import orders_of, phi
from ..samplers.dpmpp import exponential_step
from ..samplers.euler import ancestral_step, euler_step, frame, midpoint_step
from ..samplers.stage import Stage, d, noise, past, x
from ..schedules import PURE_NOISE

__all__ = ["BASE", "UNCOND", "dpm_2_ancestral_RF", "dpmpp_2m_cfg_pp", "dpmpp_2s_ancestral_RF", "dpmpp_2s_ancestral_cfg_pp",
           "euler_ancestral_RF", "euler_ancestral_cfg_pp", "gradient_estimation_cfg_pp", "ipndm_v", "lms", "res_multistep_cfg_pp"]

UNCOND, BASE = 2**32 + 1, 2**32 + 2
"""Streams of what is no noise: the unconditional estimate of a call, and the base at a call, by the number of the call."""


def lms(sigmas, *, order=4):
    """`adams.lms`, but a step to 0 ends at d."""
    steps = len(sigmas) - 1
    if sigmas[-1] > 0:
        yield from adams.lms(sigmas, order=order)
        return
    if steps > 1:
        yield from adams.lms(sigmas[:-1], order=order)
    yield Stage(sigmas[-2], d, 0.0, step=steps - 1)


def ipndm_v(sigmas, *, order=4):
    """iPNDM with the steps as they are, lower orders at first, and d at the end. Of order 2 it is Adams-Bashforth; the
    weights of orders 3 and 4 are those of its authors' code (zju-pi/diff-sampler), which are not: there a quotient of steps
    stands outside of a bracket."""
    orders = orders_of("ipndm_v", order, 4, len(sigmas) - 1, False)

    def weights(i, w):
        return None if w[i + 1] == 0 else [(w[i + 1] - w[i]) * c for c in _ipndm_v(orders[i], w[max(i - 3, 0) : i + 2])]

    return adams.multistep(sigmas, None, weights)


def _ipndm_v(order, levels):
    """Weights of the last slopes, newest first, for a step to the last of the levels."""
    h, *before = [after - at for at, after in pairwise(levels)][::-1]
    if order == 1:
        return [1.0]
    h1 = before[0]
    weights = [1 + h / (2 * h1), -h / (2 * h1)]
    if order == 2:
        return weights
    h2 = before[1]
    two, back_two = h + h1, h1 + h2
    third = (1 - h / (3 * two) * (h * two) / (h1 * back_two)) / 2
    weights = [weights[0] + third, weights[1] - (1 + h1 / h2) * third, third * h1 / h2]
    if order == 3:
        return weights
    h3 = before[2]
    three, back_three = two + h2, back_two + h3
    fourth = ((1 - h / (3 * two)) / 2 + (1 - h / (2 * two)) * h / (6 * three)) * (h * two * three) / (h1 * back_two * back_three)
    ratio = h1 * back_two / (h2 * (h2 + h3))
    return [
        weights[0] + fourth,
        weights[1] - (1 + h1 / h2 + ratio) * fourth,
        weights[2] + (h1 / h2 + ratio * (1 + h2 / h3)) * fourth,
        -fourth * ratio * h1 / h2,
    ]


# ---- rectified flow: an ancestral step that goes down in t


def _ancestral_step_of_flow(s: float, s_next: float, schedule, eta: float) -> tuple[float, float]:
    """sigma_down, sigma_up as `ancestral_step`, with t_down = t' (1 + (t'/t - 1) eta)."""
    t, t_next = float(schedule.t(s)), float(schedule.t(s_next))
    t_down = t_next * (1 + (t_next / t - 1) * eta)
    down = min(t_down / (1 - t_down), s_next) if t_down < 1 else PURE_NOISE
    return down, math.sqrt(s_next**2 - down**2)


def euler_ancestral_RF(sigmas, *, schedule, eta=1.0, s_noise=1.0):
    """An Euler step to t_down, then noise."""
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = _ancestral_step_of_flow(s, s_next, schedule, eta)
        yield Stage(s, euler_step(x, s, down) + noise("step", i, s_noise * up), s_next, step=i)


def dpm_2_ancestral_RF(sigmas, *, schedule, eta=1.0, s_noise=1.0):
    """`dpm_2_ancestral` in t, to t_down."""
    coordinates = frame(schedule)
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = _ancestral_step_of_flow(s, s_next, schedule, eta)
        if down == 0:
            yield Stage(s, d, s_next, step=i)
        else:
            yield from midpoint_step(i, s, down, coordinates, noise("step", i, s_noise * up), s_next)


def dpmpp_2s_ancestral_RF(sigmas, *, schedule, eta=1.0, s_noise=1.0):
    """`dpmpp_2s_ancestral` to t_down; from pure noise its inner call is at t = 0.9999."""
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = _ancestral_step_of_flow(s, s_next, schedule, eta)
        if down == 0:
            yield Stage(s, d, s_next, step=i)
            continue
        middle = 9999.0 if s >= PURE_NOISE else math.sqrt(s * down)
        yield Stage(s, x, s, exponential_step(s, middle, d), middle, step=i)
        yield Stage(middle, exponential_step(s, down, d) + noise("step", i, s_noise * up), s_next, step=i)


# ---- CFG++


def euler_ancestral_cfg_pp(sigmas, *, eta=1.0, s_noise=1.0):
    """x' = d + sigma_down (x - u) / sigma + sigma_up noise; from pure noise sigma_down is 0 for any eta > 0, as in ComfyUI."""
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = ancestral_step(s, s_next, eta)
        if s >= PURE_NOISE and eta > 0:
            down, up = 0.0, s_next
        yield Stage(s, _renoised(i, s, down) + noise("step", i, s_noise * up), s_next, step=i)


def _renoised(i, s, down):
    """d with the noise of the unconditional estimate, at level `down`."""
    return d + down / s * (x - noise(UNCOND, i))


def dpmpp_2s_ancestral_cfg_pp(sigmas, *, eta=1.0, s_noise=1.0):
    """`dpmpp_2s_ancestral` from the base x + d - u; u is that of the newest call."""
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = ancestral_step(s, s_next, eta)
        if down == 0:
            yield Stage(s, d + noise("step", i, s_noise * up), s_next, step=i)
            continue
        middle = math.sqrt(s * down)
        first = middle / s * (x + d - noise(UNCOND, 2 * i)) + (1 - middle / s) * d
        yield Stage(s, x, s, first, middle, step=i)
        second = down / s * (x + past(1) - noise(UNCOND, 2 * i + 1)) + (1 - down / s) * d
        yield Stage(middle, second + noise("step", i, s_noise * up), s_next, step=i)


def dpmpp_2m_cfg_pp(sigmas):
    """x' = d + e^-h (x - u) + (1 - e^-h) h / (2 h_last) (d - u_last), the last term from the second step on, but not to 0."""
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        x_next = _renoised(i, s, s_next)
        if i and s_next > 0:
            r = math.log(sigmas[i - 1] / s) / math.log(s / s_next)
            x_next += (1 - s_next / s) / (2 * r) * (d - noise(UNCOND, i - 1))
        yield Stage(s, x_next, s_next, step=i)


def res_multistep_cfg_pp(sigmas, *, eta=1.0, s_noise=1.0):
    """`res_multistep_ancestral` from the base x + d - u, with u in place of d."""
    last = None
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = ancestral_step(s, s_next, eta)
        x_next = _renoised(i, s, down)
        if down > 0 and last is not None:
            h = math.log(s / down)
            slope = h / math.log(last[0] / last[1])  # of u over this step, in differences of the last
            x_next = down / s * (x + d - noise(UNCOND, i)) + (1 - down / s) * noise(UNCOND, i)
            x_next += h * phi(2, -h) * slope * (noise(UNCOND, i) - noise(UNCOND, i - 1))
        yield Stage(s, x_next + noise("step", i, s_noise * up), s_next, step=i)
        last = (s, down)


def gradient_estimation_cfg_pp(sigmas, *, gamma=2.0):
    """x' = d + sigma' slope + (gamma - 1) (sigma' - sigma) (slope - slope_last), slope = (x - u) / sigma; to 0: d."""
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        x_next = _renoised(i, s, s_next)
        if i and s_next > 0:
            slope = (x - noise(UNCOND, i)) / s
            slope_last = (noise(BASE, i - 1) - noise(UNCOND, i - 1)) / sigmas[i - 1]
            x_next += (gamma - 1) * (s_next - s) * (slope - slope_last)
        yield Stage(s, x_next, s_next, step=i)
