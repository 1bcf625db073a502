"""Integrals that samplers share, in float64 and without cancellation at small steps."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["check_order", "check_points", "lagrange_integrals", "orders_of", "phi"]


def phi(k: int, z: float) -> float:
    """phi_k(z) = sum_n z^n / (n + k)!: phi_0 = e^z, phi_k = (phi_{k-1} - 1/(k-1)!) / z (Hochbruck & Ostermann 2010).

    The integral of e^{(1 - v) z} v^{k-1} / (k-1)! over [0, 1]. Near 0 the recursion cancels, and the series is summed.
    """
    if abs(z) < 1:
        term = total = 1 / math.factorial(k)
        n = 0
        while abs(term) > 1e-18 * abs(total):
            n += 1
            term *= z / (n + k)
            total += term
        return total
    value = math.exp(z)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def lagrange_integrals(nodes: Sequence[float], start: float, end: float, rate: float = 0.0) -> list[float]:
    """For each node the integral of e^{rate (u - end)} l_j(u) over u from start to end, with Lagrange's l_j on the nodes.

    rate = 0: the weights of Adams' methods. In v = (u - start) / h, h = end - start, the integral of
    e^{rate h (v - 1)} v^k is k! phi_{k+1}(-rate h).
    """
    h = end - start
    moments = [math.factorial(k) * phi(k + 1, -rate * h) for k in range(len(nodes))]
    places = [(u - start) / h for u in nodes]
    weights = []
    for j, place in enumerate(places):
        others = [v for k, v in enumerate(places) if k != j]
        powers = np.atleast_1d(np.poly(others))[::-1] / math.prod(place - v for v in others)  # of v^0, v^1, ...
        weights.append(h * math.fsum(float(c) * m for c, m in zip(powers, moments)))
    return weights


def orders_of(name: str, order: int, highest: int, steps: int, lower_order_final: bool) -> list[int]:
    """The order of each step of a multistep method: it rises with the history, and falls to 1 at the end if asked for.

    Raises ValueError, for the sampler `name`, unless 1 <= order <= highest.
    """
    check_order(name, order, range(1, highest + 1))
    return [min(order, i + 1, steps - i if lower_order_final else order) for i in range(steps)]


def check_points(points) -> None:
    """Raise ValueError unless this is a number of terms of a sum."""
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise ValueError(f"points is {points!r}; it takes an int of 1 or more")


def check_order(name: str, order, taken: Sequence[int], what: str = "order") -> None:
    """Raise ValueError unless an order is one of those that a sampler has."""
    if isinstance(order, bool) or not isinstance(order, int) or order not in taken:
        nearest = min(taken, key=lambda n: abs(n - order)) if isinstance(order, (int, float)) else taken[-1]
        raise ValueError(f"{what} of {name} is {order!r}; it takes {', '.join(map(str, taken))} (nearest: {nearest})")
