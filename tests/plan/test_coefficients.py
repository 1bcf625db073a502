"""Integrals that samplers share: against quadrature, and against 60 digits where float64 would cancel."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from scipy import integrate

from fastdiff.samplers.coefficients import lagrange_integrals, phi


@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("z", [0.0, 1e-12, -1e-8, 3e-4, -0.02, 0.7, -0.999, 1.0, -1.5, 4.0, -30.0])
def test_phi_to_its_last_bits(k, z):
    with localcontext() as context:
        context.prec = 60
        exact = sum((Decimal(z) ** n / math.factorial(n + k) for n in range(1, 200)), Decimal(1) / math.factorial(k))
    assert phi(k, z) == pytest.approx(float(exact), rel=2e-14 if abs(z) < 1 else 2e-13)


@pytest.mark.parametrize("rate", [0.0, 1.0, 2.0, -0.7])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_lagrange_integrals_are_those_of_quadrature(rate, count):
    nodes, start, end = [1.3, 0.9, 0.2, -0.4][:count], 1.3, 1.9
    for j, weight in enumerate(lagrange_integrals(nodes, start, end, rate)):
        def term(u, j=j):
            return math.exp(rate * (u - end)) * math.prod((u - v) / (nodes[j] - v) for k, v in enumerate(nodes) if k != j)

        assert weight == pytest.approx(integrate.quad(term, start, end, epsabs=1e-14, epsrel=1e-13)[0], rel=1e-11)


@pytest.mark.parametrize("h", [1.0, 1e-3, 1e-6, 1e-9])
def test_small_steps_do_not_cancel(h):
    """For equal steps of any size: h times the weights of Adams-Bashforth, for rate 1 up to order h."""
    adams = np.array([55, -59, 37, -9]) / 24
    plain = np.array(lagrange_integrals([0.0, -h, -2 * h, -3 * h], 0.0, h)) / h
    assert plain == pytest.approx(adams, rel=1e-12)
    assert np.array(lagrange_integrals([0.0, -h, -2 * h, -3 * h], 0.0, h, 1.0)) / h == pytest.approx(adams, rel=2 * h + 1e-12)
