"""Predictor and corrector: UniPC and SA-Solver. The base is the corrected state, the model is called at the predicted one.

In lambda = -ln sigma and VE coordinates the ODE is dx/dlambda = d - x, the SDE of SA-Solver

    dx = (1 + tau^2) (d - x) dlambda + sqrt(2) tau sigma dw

and both are solved exactly for a d that is a polynomial in lambda through the last estimates; the corrector's goes
through the newest one too.
"""

import math
from itertools import pairwise

import numpy as np

from ..noise import unknown
from .coefficients import check_order, lagrange_integrals, orders_of, phi
from .stage import Stage, d, noise, past, x, xe, y

__all__ = ["sa_solver", "unipc"]


def _predict_and_correct(sigmas, predict, correct, pece=False):
    """Stages of: x_i = correct(i), the base at level i from that at i - 1; x~_{i+1} = predict(i), from x_i. pece: the model
    is called at x_i too, and predict(i) is from that call."""
    steps = len(sigmas) - 1
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        ahead = d if s_next == 0 else predict(i)
        base = correct(i) if i else x
        if pece and i:
            yield Stage(s, base, s, step=i)
            base = x
        if i + 1 == steps:
            yield Stage(s, ahead.replace("x", base), s_next, step=i)
        else:
            yield Stage(s, base, s, ahead.replace("x", y), s_next, step=i)


def unipc(sigmas, *, order=2, solver_type="bh2", lower_order_final=True):
    """UniPC for the denoised estimate (Zhao et al. 2023, arXiv:2302.04867, algorithms 5 and 6).

    solver_type: B(h) is h ("bh1") or e^h - 1 ("bh2"), which matters where there is one difference only: its weight is
    then 1/2. order: of the predictor, 1 to 3; with its corrector the accuracy is one order more. lower_order_final: the
    last steps fall to order 1, as in diffusers. The step to 0 ends at d.
    """
    if solver_type not in ("bh1", "bh2"):
        raise ValueError(unknown("solver_type", solver_type, ("bh1", "bh2")))
    orders = orders_of("unipc", order, 3, len(sigmas) - 1, lower_order_final)
    lam = [-math.log(s) if s > 0 else math.inf for s in sigmas]

    def update(start, end, estimates, used, newest=None):
        """From level start to end with estimates at start, start - 1, ...; newest: that at end."""
        h, known = lam[end] - lam[start], estimates[0]
        nodes = [(estimates[k] - known, (lam[start - k] - lam[start]) / h) for k in range(1, used)]
        nodes += [] if newest is None else [(newest - known, 1.0)]
        scale = -h if solver_type == "bh1" else math.expm1(-h)  # B
        ratios = np.array([r for _, r in nodes])
        moments = [-h * phi(k + 1, -h) * math.factorial(k) / scale for k in range(1, len(nodes) + 1)]
        weights = [0.5] if len(nodes) == 1 else np.linalg.solve(np.vander(ratios, increasing=True).T, moments)
        terms = (scale * float(w) / r * difference for w, (difference, r) in zip(weights, nodes))
        return sigmas[end] / sigmas[start] * x - math.expm1(-h) * known - sum(terms, 0.0 * x)

    return _predict_and_correct(
        sigmas,
        lambda i: update(i, i + 1, [past(k) for k in range(3)], orders[i]),
        lambda i: update(i - 1, i, [past(1 + k) for k in range(3)], orders[i - 1], newest=d),
    )


def sa_solver(sigmas, *, predictor_order=2, corrector_order=2, tau=1.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0,
              lower_order_final=True, few_steps=True, pece=False):
    """SA-Solver (Xue et al. 2023, arXiv:2309.05019, algorithm 1): stochastic Adams, predictor and corrector.

    tau: the noise's strength where s_tmin <= sigma <= s_tmax at the step's start, 0 elsewhere (the paper: 0.05 to 1);
    predictor_order 1 to 3, corrector_order 0 (none) to 4. The corrector adds the predictor's noise again, which a row names
    by its address. few_steps: the change of order h^3 that its authors' code makes at order 2. lower_order_final: orders
    fall towards the end (diffusers), or before a step to 0, which ends at d (ComfyUI). pece: one more call in each step but
    the first, at the corrected state, whose estimate takes the place of the predicted one's.
    """
    check_order("sa_solver", predictor_order, (1, 2, 3), "predictor_order")
    check_order("sa_solver", corrector_order, (0, 1, 2, 3, 4), "corrector_order")
    if not isinstance(pece, bool):
        raise TypeError(f"pece is {pece!r}; it takes True or False")
    steps, to_zero = len(sigmas) - 1, int(sigmas[-1] == 0)
    lam = [-math.log(s) if s > 0 else math.inf for s in sigmas]

    def update(start, nodes, correct):
        """From level start to the next, with the estimates at the levels `nodes`, newest first."""
        end, strength = start + 1, tau if s_tmin <= sigmas[start] <= s_tmax else 0.0
        rate, h = 1 + strength**2, lam[end] - lam[start]
        weights = [rate * c for c in lagrange_integrals([lam[k] for k in nodes], lam[start], lam[end], rate)]
        if few_steps and len(nodes) == 2:
            excess = h * h * phi(2, -rate * h)  # of the exact integral; h^2 / 2 in its place
            moved = (h * h / 2 - excess) / (h if correct else lam[start] - lam[start - 1])
            weights = [weights[0] + rate * moved, weights[1] - rate * moved]
        spread = s_noise * sigmas[end] * math.sqrt(-math.expm1(-2 * strength**2 * h))
        ago = [max(2 * j - correct, 0) if pece else j for j in range(len(nodes))]
        estimates = sum((w * past(n) for n, w in zip(ago, weights)), 0.0 * x)
        return math.exp(-rate * h) * x + estimates + noise("step", start, spread)

    def predict(i):
        used = min(predictor_order, i + 1, steps - i - to_zero if lower_order_final else steps)
        return update(i, [i - j for j in range(used)], False)

    def correct(i):
        used = min(corrector_order, i + 1, steps - i + 2 - 2 * to_zero if lower_order_final else corrector_order)
        return update(i - 1, [i - j for j in range(used)], True) if used else xe  # the predicted state stays

    return _predict_and_correct(sigmas, predict, correct, pece)
