"""Vectors added to activations in proportion to their norm: what every backend of ``fastdiff::edit_`` computes.

For sample b and element e, with v = index[b, m] (m where there is no index):

    norm   = sqrt(sum_e h[b, e]^2)                       the sum in the fixed tree, see reduce.py
    c_m    = weight[b, m] norm
    out    = h[b, e] + sum_m c_m bank[v, e]              from h on one fma a term, in order of m

Arithmetic. Everything float32; the root is correctly rounded, each c_m is rounded once, out once when it is stored. A term whose
weight is exactly 0 does not exist, whatever the norm; nor does one whose c_m is exactly 0. A sample without a term is h: in every
bit where out has its dtype, NaN included, else rounded. Apart from that, NaN is stored as the canonical quiet NaN.
"""

import numpy as np

from .float32 import widen
from .project import terms
from .reduce import norm
from .step import EXACT

__all__ = ["edit"]


def edit(h, bank, index, weight, *, dtype="float32", output=None, arithmetic=EXACT):
    """h: (B, n) as stored in ``dtype``, bfloat16 as uint16 bits; bank: (V, n); index: (B, M) int or None; weight: (B, M);
    output: dtype name of the result, by default ``dtype``. Indices outside the bank are clamped. Returns (B, n): float32,
    float16, or uint16 bits for bfloat16; float64 in FLOAT64."""
    A = arithmetic
    output = output or dtype
    values = np.asarray(widen(h, dtype), A.dtype)
    bank = np.asarray(bank, A.dtype)
    stored = []
    for b, value in enumerate(values):
        size = norm(value, A)
        used = False
        for v, w in terms(None if index is None else index[b], weight[b], len(bank)):
            c = A.scaled(w, size)
            if c != 0:
                value, used = A.fma(c, bank[v], value), True
        as_it_was = not used and output == dtype and A is EXACT
        stored.append(np.asarray(h[b]) if as_it_was else A.store(value, output))
    return np.stack(stored) if stored else A.store(values, output)
