"""Exponential integrators beyond DPM-Solver: RES, SEEDS, ER-SDE. Coordinates and signs as in `dpmpp`: lambda = -ln sigma,
h the step in lambda, h_eta = (1 + eta) h, and the SDE dx = (1 + eta) (d - x) dlambda + sqrt(2 eta) sigma dw."""

import math
from itertools import pairwise

from ..noise import unknown
from .coefficients import check_order, check_points, phi
from .euler import ancestral_step, euler_step, frame
from .path import takes_path
from .stage import Stage, d, noise, past, x

__all__ = ["er_sde", "res_multistep", "res_multistep_ancestral", "seeds_2", "seeds_3"]


def res_multistep(sigmas, *, schedule=None):
    """RES, the multistep of order 2 (Zhang et al. 2023, arXiv:2308.02157): d is linear in lambda through this
    estimate and the last, integrated exactly. Equal to dpmpp_2m with solver_type="heun", but for a flow: in ln t."""
    to_frame, _ = frame(schedule)
    last = None
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        (a, w), (a_next, w_next) = to_frame(s), to_frame(s_next)
        yield Stage(s, _res(a * x, w, w_next, last) / a_next, s_next, step=i)
        last = (w, w_next)


@takes_path
def res_multistep_ancestral(sigmas, *, eta=1.0, s_noise=1.0):
    """`res_multistep` to sigma_down, then noise of sigma_up. As in ComfyUI the slope of d is taken over the last step's way
    to its sigma_down, not over the whole of it."""
    last = None
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        down, up = ancestral_step(s, s_next, eta)
        yield Stage(s, _res(x, s, down, last) + noise("step", i, s_noise * up), s_next, step=i)
        last = (s, down)


def _res(point, s, s_next, last):
    """From s to s_next; last: the levels between which the slope of d is taken, None for an Euler step."""
    if s_next == 0 or last is None:
        return euler_step(point, s, s_next)
    h = math.log(s / s_next)
    return euler_step(point, s, s_next) + h * phi(2, -h) * (h / math.log(last[0] / last[1])) * (d - past(1))


def _exponential(s, s_next, eta, weights, noises):
    """From s to s_next: e^-h_eta x + sum of weights times estimates + sigma' noise, noises as (how much of the step ended
    before this noise began, how much when it ended, address, s_noise); earlier noise decays like x does."""
    h = math.log(s / s_next)
    result = math.exp(-(1 + eta) * h) * x + sum((w * m for w, m in weights), 0.0 * x)
    for begin, end, draw, s_noise in noises:
        left, spread = math.exp(-(1 - end) * h * eta), math.sqrt(-math.expm1(-2 * (end - begin) * h * eta))
        result += noise("step", draw, s_noise * s_next * left * spread)
    return result


@takes_path
def seeds_2(sigmas, *, eta=1.0, s_noise=1.0, r=0.5, solver_type="phi_1"):
    """SEEDS-2 (Gonzalez et al. 2023, arXiv:2305.14267), for the denoised estimate: DPM-Solver++(2S) for the
    SDE, its inner call at r h; the noise of the whole step holds that of the inner one.

    solver_type: weights that are right for constants ("phi_1") or for slopes too ("phi_2"). r = 1 with "phi_2" is the
    exponential Heun method (ComfyUI's exp_heun_2_x0, with eta = 0, and exp_heun_2_x0_sde).
    """
    if solver_type not in ("phi_1", "phi_2"):
        raise ValueError(unknown("solver_type", solver_type, ("phi_1", "phi_2")))
    _check_places(r)
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        if s_next == 0:
            yield Stage(s, d, 0.0, step=i)
            continue
        inner, h = s ** (1 - r) * s_next**r, (1 + eta) * math.log(s / s_next)
        first = [(0.0, 1.0, 2 * i, s_noise)]
        yield Stage(s, x, s, _exponential(s, inner, eta, [(-math.expm1(-r * h), d)], first), inner, step=i)
        slope = -math.expm1(-h) / (2 * r) if solver_type == "phi_1" else h * phi(2, -h) / r
        weights = [(-math.expm1(-h) - slope, past(1)), (slope, d)]
        both = [(0.0, r, 2 * i, s_noise), (r, 1.0, 2 * i + 1, s_noise)]
        yield Stage(inner, _exponential(s, s_next, eta, weights, both), s_next, step=i)


@takes_path
def seeds_3(sigmas, *, eta=1.0, s_noise=1.0, r_1=1 / 3, r_2=2 / 3):
    """SEEDS-3 (Gonzalez et al. 2023, arXiv:2305.14267), for the denoised estimate: DPM-Solver++(3S) for the SDE, with inner
    calls at r_1 h and r_2 h, and three noises, of which each call's state holds those before it."""
    _check_places(r_1, r_2)
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        if s_next == 0:
            yield Stage(s, d, 0.0, step=i)
            continue
        inner, outer = (s ** (1 - r) * s_next**r for r in (r_1, r_2))
        h, draws = (1 + eta) * math.log(s / s_next), [3 * i, 3 * i + 1, 3 * i + 2]
        first = [(0.0, 1.0, draws[0], s_noise)]
        yield Stage(s, x, s, _exponential(s, inner, eta, [(-math.expm1(-r_1 * h), d)], first), inner, step=i)
        slope = r_2 / r_1 * (r_2 * h) * phi(2, -r_2 * h)
        weights = [(-math.expm1(-r_2 * h) - slope, past(1)), (slope, d)]
        share = r_1 / r_2
        two = [(0.0, share, draws[0], s_noise), (share, 1.0, draws[1], s_noise)]
        yield Stage(inner, x, s, _exponential(s, outer, eta, weights, two), outer, step=i)
        slope = h * phi(2, -h) / r_2
        weights = [(-math.expm1(-h) - slope, past(2)), (slope, d)]
        places = [0.0, r_1, r_2, 1.0]
        three = [(*pair, draw, s_noise) for pair, draw in zip(pairwise(places), draws)]
        yield Stage(outer, _exponential(s, s_next, eta, weights, three), s_next, step=i)


def _check_places(*places):
    """0 < r_1 < r_2 <= 1."""
    if not all(a < b for a, b in pairwise((0.0, *places))) or places[-1] > 1:
        names = ["r"] if len(places) == 1 else [f"r_{k + 1}" for k in range(len(places))]
        given = ", ".join(f"{name} is {place}" for name, place in zip(names, places))
        raise ValueError(f"{given}; it takes 0 < {' < '.join(names)} <= 1")


@takes_path
def er_sde(sigmas, *, order=3, s_noise=1.0, points=200):
    """Extended reverse-time SDE, ER-SDE-Solver-1 to 3 (Cui et al. 2023, arXiv:2309.06169) in VE form.

    The SDE's noise is phi(sigma) = sigma (e^(sigma^0.3) + 10), the default of its authors' code; r = phi(sigma') / phi(sigma):

        x' = r x + (1 - r) d + (sigma' - sigma + phi(sigma') I_0) d' + ((sigma' - sigma)^2 / 2 + phi(sigma') I_1) d''

    I_0, I_1: the integrals of 1/phi and (u - sigma)/phi from sigma' to sigma, as sums of `points` terms, as the authors
    have them; d', d'': difference quotients in sigma. order: 1 to 3.
    """
    check_order("er_sde", order, (1, 2, 3))
    check_points(points)
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        if s_next == 0:
            yield Stage(s, d, 0.0, step=i)
            continue
        at_next, r = _er_scale(s_next), _er_scale(s_next) / _er_scale(s)
        x_next, step = r * x + (1 - r) * d, (s - s_next) / points
        places = [s_next + step * k for k in range(points)]
        if i >= 1 and order >= 2:
            slope = (d - past(1)) / (s - sigmas[i - 1])
            x_next += (s_next - s + at_next * step * math.fsum(1 / _er_scale(u) for u in places)) * slope
            if i >= 2 and order >= 3:
                before = (past(1) - past(2)) / (sigmas[i - 1] - sigmas[i - 2])
                curvature = 2 / (s - sigmas[i - 2]) * (slope - before)
                moment = step * math.fsum((u - s) / _er_scale(u) for u in places)
                x_next += ((s_next - s) ** 2 / 2 + at_next * moment) * curvature
        up = math.sqrt(max(s_next**2 - (s * r) ** 2, 0.0))
        yield Stage(s, x_next + noise("step", i, s_noise * up), s_next, step=i)


def _er_scale(sigma):
    return sigma * (math.exp(sigma**0.3) + 10.0)
