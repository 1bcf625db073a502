"""DPM-Solver's single-step methods: no history between steps of two or three model calls (Lu et al. 2022, arXiv:2206.00927
for eps, "dpmsolver"; 2022b, arXiv:2211.01095 for the denoised estimate, "dpmsolver++").

In VE coordinates and lambda = -ln sigma, with the step's h:

    dpmsolver      x' = x - sigma' [(e^h - 1) eps + ...]
    dpmsolver++    x' = sigma'/sigma x + (1 - e^-h) d + ...
"""

import math

from ..noise import unknown
from .coefficients import check_order, phi
from .euler import ancestral_step
from .stage import Stage, noise, past, x

__all__ = ["dpm_fast", "dpmpp_singlestep"]

ALGORITHMS, SOLVERS = ("dpmsolver", "dpmsolver++"), ("midpoint", "heun")


def _groups(order, steps, to_zero):
    """How many calls each step of a run of `steps` calls takes, so that lower orders come last (diffusers' order list)."""
    if order == 2:
        groups = [2] * (steps // 2 - 1) + [1, 1] if steps % 2 == 0 else [2] * (steps // 2) + [1]
    else:
        thirds, left = divmod(steps, 3)
        groups = [[3] * (thirds - 1) + [2, 1], [3] * thirds + [1], [3] * thirds + [2]][left]
    if to_zero and groups[-1] > 1:  # the last level has no logarithm
        groups[-1:] = [groups[-1] - 1, 1]
    return groups


def dpmpp_singlestep(sigmas, *, order=2, algorithm="dpmsolver++", solver_type="midpoint"):
    """DPM-Solver-2 and -3 (algorithms 1 and 2), DPM-Solver++(2S) and (3S), whose inner calls are at levels of the grid: `steps`
    model calls, of which 2 or 3 make one step; the last steps have fewer, as diffusers' DPMSolverSinglestepScheduler does.

    order: 2 or 3; algorithm: "dpmsolver++" or "dpmsolver"; solver_type: "midpoint" or "heun", the weight of the highest
    difference.
    """
    check_order("dpmpp_singlestep", order, (2, 3))
    if algorithm not in ALGORITHMS:
        raise ValueError(unknown("algorithm", algorithm, ALGORITHMS))
    if solver_type not in SOLVERS:
        raise ValueError(unknown("solver_type", solver_type, SOLVERS))
    steps, at = len(sigmas) - 1, 0
    for calls in _groups(order, steps, sigmas[-1] == 0):
        yield from _step(at, sigmas[at : at + calls + 1], algorithm, {2: solver_type, 3: solver_type})
        at += calls


def dpm_fast(sigmas, *, eta=0.0, s_noise=1.0):
    """DPM-Solver-fast (Lu et al. 2022, section 3.4): `steps` model calls, in steps of order 3 uniform in
    ln sigma from the first level to the last that is not 0, where it ends; the last step or two have lower orders.

    The levels between are its own. eta: each step goes to sigma_down, and noise brings it back, as in k-diffusion.
    """
    calls, last = len(sigmas) - 1, min(s for s in sigmas if s > 0)
    if last == sigmas[0]:
        raise ValueError("dpm_fast takes at least 2 levels that are not 0 (2 steps or more); given 1")
    count = calls // 3 + 1
    orders = [3] * (count - 2) + [2, 1] if calls % 3 == 0 else [3] * (count - 1) + [calls % 3]
    ratio = last / sigmas[0]
    grid = [sigmas[0] * ratio ** (i / count) for i in range(count)] + [last]
    for i, (order, s, s_next) in enumerate(zip(orders, grid, grid[1:])):
        down = max(last, ancestral_step(s, s_next, eta)[0])
        up = math.sqrt(max(s_next**2 - down**2, 0.0))
        levels = [s * (down / s) ** (j / order) for j in range(order)] + [down]
        solvers = {2: "midpoint"} if order == 2 else {2: "heun", 3: "midpoint"}
        yield from _step(i, levels, "dpmsolver", solvers, s_noise * up, s_next)


def _step(step, levels, algorithm, solvers, up=0.0, s_next=None):
    """One step through `levels`, a call at each but the last, all from the base; then noise of level `up`, to s_next."""
    calls = len(levels) - 1

    def estimates(count):
        """What the solver extrapolates, oldest first, after `count` calls: d, or eps = (point - d) / sigma."""
        found = []
        for j in range(count):
            denoised = past(count - 1 - j)
            if algorithm == "dpmsolver":
                point = _solve(levels[: j + 1], found, algorithm, solvers) if j else x
                denoised = (point - denoised) / levels[j]
            found.append(denoised)
        return found

    for count in range(1, calls):
        ahead = _solve(levels[: count + 1], estimates(count), algorithm, solvers)
        yield Stage(levels[count - 1], x, levels[0], ahead, levels[count], step=step)
    x_next = _solve(levels, estimates(calls), algorithm, solvers) + noise("step", step, up)
    yield Stage(levels[-2], x_next, levels[-1] if s_next is None else s_next, step=step)


def _solve(levels, m, algorithm, solvers):
    """From levels[0] to levels[-1] with the estimates m at levels[:-1].

    With z = h for eps and -h for d, the exact weights of m0, of its slope and of its curvature (D1, D2 of the papers) are
    z phi_1, z phi_2, z phi_3 of z. solvers: for 2 and 3 estimates, "heun" has these; "midpoint" has half of z phi_1 for the
    slope at 2 estimates, and takes for the slope at 3 the difference to the newest alone.
    """
    s, s_next = levels[0], levels[-1]
    keep, scale = (1.0, s_next) if algorithm == "dpmsolver" else (s_next / s, 1.0)
    if s_next == 0:  # one estimate, and the limit of its weight
        return keep * x - (s if algorithm == "dpmsolver" else -1.0) * m[0]
    h = math.log(s / s_next)
    z = h if algorithm == "dpmsolver" else -h
    result = keep * x - scale * math.expm1(z) * m[0]
    r = [math.log(s / level) / h for level in levels[1:-1]]
    D1 = [(estimate - m[0]) / place for estimate, place in zip(m[1:], r)]
    if len(m) == 2:
        result -= scale * (math.expm1(z) / 2 if solvers[2] == "midpoint" else z * phi(2, z)) * D1[0]
    elif len(m) == 3 and solvers[3] == "midpoint":
        result -= scale * z * phi(2, z) * D1[1]
    elif len(m) == 3:
        slope = (r[1] * D1[0] - r[0] * D1[1]) / (r[1] - r[0])
        curvature = 2 / (r[1] - r[0]) * (D1[1] - D1[0])
        result -= scale * (z * phi(2, z) * slope + z * phi(3, z) * curvature)
    return result
