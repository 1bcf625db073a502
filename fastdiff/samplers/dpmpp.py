"""DPM-Solver++: exponential integrators for the denoised estimate (Lu et al. 2022b, arXiv:2211.01095).

In VE coordinates, with lambda = -ln sigma, the probability-flow ODE is dx/dlambda = d - x, and its SDE with noise eta

    dx = (1 + eta) (d - x) dlambda + sqrt(2 eta) sigma dw          (eta = 1: the reverse SDE of eq. 6)

Both are solved exactly for a d that is a polynomial in lambda; the solvers differ in how they find its coefficients.
h is the step in lambda; h_eta = (1 + eta) h. noise: "independent" draws, or "brownian": increments of one path in sigma, the
same whatever the number of steps, as k-diffusion's BrownianTreeNoiseSampler (`fastdiff.brownian`).
"""

import math
from itertools import pairwise

from ..brownian import NORMALS
from ..noise import unknown
from .euler import ancestral_step
from .options import step_noises
from .stage import Stage, d, past, x
from .stage import noise as draw

__all__ = ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s_ancestral", "dpmpp_3m", "dpmpp_3m_sde", "dpmpp_sde", "exponential_step"]


def dpmpp_2m(sigmas, *, solver_type="midpoint"):
    """DPM-Solver++(2M), algorithm 2: `dpmpp_2m_sde` without noise."""
    return dpmpp_2m_sde(sigmas, eta=0.0, solver_type=solver_type)


def dpmpp_2m_sde(sigmas, *, eta=1.0, s_noise=1.0, solver_type="midpoint", noise="independent"):
    """SDE-DPM-Solver++(2M), appendix D: d is linear in lambda, through this estimate and the last.

    "midpoint" integrates its slope with weight (1 - e^-h_eta)/2, "heun" exactly.
    """
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(unknown("solver_type", solver_type, ("midpoint", "heun")))
    unit, h_last = step_noises(noise, sigmas), None
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        if s_next == 0:
            yield Stage(s, d, 0.0, step=i)
            continue
        h = math.log(s / s_next)
        h_eta = (1 + eta) * h
        x_next = math.exp(-h_eta) * x - math.expm1(-h_eta) * d
        if h_last is not None:
            slope = (d - past(1)) * (h / h_last)
            x_next += slope * (-math.expm1(-h_eta) / 2 if solver_type == "midpoint" else _phi_2(h_eta))
        yield Stage(s, x_next + s_noise * _sde_sigma(s_next, h, eta) * unit[i], s_next, step=i)
        h_last = h


def dpmpp_3m(sigmas, *, curvature=1.0):
    """DPM-Solver++(3M): `dpmpp_3m_sde` without noise."""
    return dpmpp_3m_sde(sigmas, eta=0.0, curvature=curvature)


def dpmpp_3m_sde(sigmas, *, eta=1.0, s_noise=1.0, curvature=1.0, noise="independent"):
    """SDE-DPM-Solver++(3M) as k-diffusion has it: d is quadratic in lambda, through three estimates.

    curvature: weight of the quadratic term. d2 below is h^2 d''/2, and its exact weight is -2 phi_3. DPM-Solver's code,
    k-diffusion and diffusers have -phi_3 (curvature=1), with which the order is 2; curvature=2 gives order 3.
    """
    unit, h_1, h_2 = step_noises(noise, sigmas), None, None
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        if s_next == 0:
            yield Stage(s, d, 0.0, step=i)
            continue
        h = math.log(s / s_next)
        h_eta = (1 + eta) * h
        x_next = math.exp(-h_eta) * x - math.expm1(-h_eta) * d
        if h_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (d - past(1)) / r0, (past(1) - past(2)) / r1
            d1 = d1_0 + (d1_0 - d1_1) * (r0 / (r0 + r1))
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x_next += _phi_2(h_eta) * d1 - curvature * (_phi_2(h_eta) / h_eta - 0.5) * d2
        elif h_1 is not None:
            x_next += _phi_2(h_eta) * (d - past(1)) * (h / h_1)
        yield Stage(s, x_next + s_noise * _sde_sigma(s_next, h, eta) * unit[i], s_next, step=i)
        h_1, h_2 = h, h_1


def dpmpp_2s_ancestral(sigmas, *, eta=1.0, s_noise=1.0, noise="independent"):
    """DPM-Solver++(2S), algorithm 1 with r = 1/2, to sigma_down; then noise of sigma_up."""
    unit = step_noises(noise, sigmas)
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = ancestral_step(s, s_next, eta)
        added = s_noise * up * unit[i] if up else 0
        if down == 0:
            yield Stage(s, d + added, s_next, step=i)
            continue
        middle = math.sqrt(s * down)
        yield Stage(s, x, s, exponential_step(s, middle, d), middle, step=i)
        yield Stage(middle, exponential_step(s, down, d) + added, s_next, step=i)


def dpmpp_sde(sigmas, *, eta=1.0, s_noise=1.0, r=0.5, noise="independent"):
    """DPM-Solver++ with ancestral noise in both of its stages, as k-diffusion has it; r places the inner one.

    The noises are increments of one Brownian motion in sigma, over the inner and over the whole step. These overlap:
    with independent noises the law of the samples would be off by order h. noise says how the steps hang together; a
    Brownian path is bridged inside of a step by a draw of the step's own.
    """
    if not 0 < r <= 1:
        raise ValueError(f"r is {r}; it takes 0 < r <= 1")
    unit = step_noises(noise, sigmas, NORMALS - 1)
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        if s_next == 0:
            yield Stage(s, d, 0.0, step=i)
            continue
        inner = s ** (1 - r) * s_next**r
        shared = (s - inner) / (s - s_next)  # of the whole increment's variance
        if noise == "brownian":
            whole = unit[i]
            first = math.sqrt(shared) * whole + draw("step", i, math.sqrt(1 - shared))
        else:
            first = draw("step", 2 * i)
            whole = math.sqrt(shared) * first + draw("step", 2 * i + 1, math.sqrt(1 - shared))
        down, up = ancestral_step(s, inner, eta)
        yield Stage(s, x, s, exponential_step(s, down, d) + s_noise * up * first, inner, step=i)
        down, up = ancestral_step(s, s_next, eta)
        estimate = (1 - 1 / (2 * r)) * past(1) + 1 / (2 * r) * d
        yield Stage(inner, exponential_step(s, down, estimate) + s_noise * up * whole, s_next, step=i)


def exponential_step(s, s_next, estimate):
    """The exact solution from s to s_next for a constant estimate: e^-h x + (1 - e^-h) d with e^-h = s_next / s."""
    return s_next / s * x + (1 - s_next / s) * estimate


def _phi_2(h):
    """(e^-h - 1)/h + 1 = h phi_2(-h): the integral of e^(tau - h) tau / h over [0, h]."""
    return math.expm1(-h) / h + 1


def _sde_sigma(s_next, h, eta):
    """The standard deviation of the noise that the SDE adds in a step."""
    return s_next * math.sqrt(-math.expm1(-2 * eta * h))
