"""Solvers that fastdiff does not ship yet, written as stages: they test the form of a row, not a feature."""

import math
from itertools import pairwise

import numpy as np

from fastdiff.samplers.stage import Stage, d, noise, past, x, y

__all__ = ["diffusers_3m_sde", "sa_solver", "unipc"]


def unipc(sigmas, *, order=2):
    """UniPC, B2(h), for the denoised estimate (Zhao et al. 2023, algorithms 5 and 6), orders as diffusers chooses them.

    The base is the corrected state, the evaluation point the predicted one.
    """
    levels = np.array(sigmas)
    lam = -np.log(np.maximum(levels, 1e-300))
    steps = len(levels) - 1
    orders = [min(order, steps - i, i + 1) for i in range(steps)]

    def update(start, end, estimates, used, corrected=None):
        """From level start to level end with estimates at start, start - 1, ...; corrected: the estimate at end."""
        h = lam[end] - lam[start]
        known = [(estimates[k] - estimates[0], (lam[start - k] - lam[start]) / h) for k in range(1, used)]
        nodes = known if corrected is None else [*known, (corrected - estimates[0], 1.0)]
        result = levels[end] / levels[start] * x - math.expm1(-h) * estimates[0]
        if not nodes:
            return result
        ratios = np.array([r for _, r in nodes])
        weights = np.linalg.solve(np.stack([ratios**k for k in range(len(nodes))]), _b(-h, len(nodes)))
        if len(nodes) == 1:
            weights = [0.5]  # the simplification of section 3.4
        return result - sum(
            (math.expm1(-h) * w / r * difference for w, (difference, r) in zip(weights, nodes)), 0.0 * x
        )

    for i in range(steps):
        base = x if i == 0 else update(i - 1, i, [past(1 + k) for k in range(3)], orders[i - 1], corrected=d)
        ahead = d if levels[i + 1] == 0 else update(i, i + 1, [past(k) for k in range(3)], orders[i])
        if i + 1 == steps:
            yield Stage(levels[i], ahead.replace("x", base), levels[i + 1], step=i)
        else:
            yield Stage(levels[i], base, levels[i], ahead.replace("x", y), levels[i + 1], step=i)


def _b(hh, count):
    """phi_{k+1}(hh) k! / B(hh) hh for k = 1..count, with B = e^hh - 1."""
    result, phi, factorial = [], math.expm1(hh) / hh - 1, 1
    for k in range(1, count + 1):
        result.append(phi * factorial / math.expm1(hh))
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    return np.array(result)


def sa_solver(sigmas, *, predictor=2, corrector=2, tau=lambda s: 1.0):
    """SA-Solver (Xue et al. 2023, algorithm 1): stochastic Adams-Bashforth predictor and Adams-Moulton corrector.

    The corrector adds the predictor's noise again, which a row names by its address.
    """
    levels = np.array(sigmas)
    lam = -np.log(levels)
    steps = len(levels) - 1

    def update(start, end, nodes, estimates, mode):
        """From start to end; estimates at the levels `nodes`."""
        rate, h = 1 + tau(levels[start]) ** 2, lam[end] - lam[start]
        weights = []
        for i in range(len(nodes)):
            others = [k for k in range(len(nodes)) if k != i]
            poly = np.poly1d([1.0])
            for k in others:  # Lagrange's basis, in lambda counted from the end
                poly *= np.poly1d([1.0, lam[end] - lam[nodes[k]]]) / (lam[nodes[i]] - lam[nodes[k]])
            weights.append(rate * _integral(poly, rate, -h))
        if len(nodes) == 2:  # diffusers' change of order h^3 for few steps
            excess = (h * rate - 1 + math.exp(-rate * h)) / rate**2
            extra = (h**2 / 2 - excess) / (lam[start] - lam[start - 1]) if mode == "predict" else h / 2 - excess / h
            weights[0] += rate * extra
            weights[1] -= rate * extra
        spread = levels[end] * math.sqrt(-math.expm1(-2 * tau(levels[start]) ** 2 * h))
        decay = math.exp(-(rate - 1) * h) * levels[end] / levels[start]
        return decay * x + sum((w * e for w, e in zip(weights, estimates)), 0.0 * x) + noise("step", start, spread)

    for i in range(steps):
        base = x
        if i > 0:
            used = min(corrector, steps - i + 2, i + 1)
            base = update(i - 1, i, [i - k for k in range(used)], [past(k) for k in range(used)], "correct")
        used = min(predictor, steps - i, i + 1)
        ahead = update(i, i + 1, [i - k for k in range(used)], [past(k) for k in range(used)], "predict")
        if i + 1 == steps:
            yield Stage(levels[i], ahead.replace("x", base), levels[i + 1], step=i)
        else:
            yield Stage(levels[i], base, levels[i], ahead.replace("x", y), levels[i + 1], step=i)


def _integral(poly, rate, start):
    """The integral of e^(rate u) poly(u) over [start, 0]."""
    total, sign, derivative, power = 0.0, 1.0, poly, rate
    while True:  # by parts
        total += sign * (derivative(0.0) - math.exp(rate * start) * derivative(start)) / power
        if derivative.order == 0:
            return total
        derivative, sign, power = derivative.deriv(), -sign, power * rate


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
