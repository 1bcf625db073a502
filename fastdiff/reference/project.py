"""Projections on vectors and their sums: what every backend of ``fastdiff::project_`` and ``fastdiff::lift_`` computes.

For sample b and term m, with v = index[b, m] (m where there is no index) and r the sample's row:

    project    p = sum_e basis[v, e] x[b, e]                              in the fixed tree, see reduce.py
               out[b, m] = weight[b, m] fma(gain[r, v], p, offset[r, v])
    lift       out[b, e] = sum_m weight[b, m] basis[v, e]                 one fma a term, in order of m

Arithmetic. Everything float32; the product with the weight is rounded on its own, and left out where there are no weights. Where
the gain is exactly 0, x and the vector are not read: weight times offset. Where the weight is exactly 0, nothing is read: the
projection is 0.0, the lifted term does not exist. A lifted sum starts at -0.0, the neutral element, so that its first term is a
product; without a term it stays -0.0. NaN is stored as the canonical quiet NaN.
"""

import numpy as np

from .reduce import dot
from .step import EXACT

__all__ = ["lift", "project"]

MAX_TERMS = 4096  # of lift_ and edit_; csrc/reduce.h has the same


def terms(index, weight, vectors):
    """Vector and weight of every term that one sample has: those whose weight is not 0, in order. An index outside the vectors is
    clamped, as a device does."""
    for m, w in enumerate(weight):
        if w != 0:
            yield min(max(int(m if index is None else index[m]), 0), vectors - 1), w


def project(x, basis, index, gain, offset, weight=None, row=0, *, count=None, arithmetic=EXACT):
    """x: (B, n), values widened to float32 (or float64); basis: (V, n); index: (B, M) int or None; gain, offset: (N, V);
    weight: (B, M) or None; row: int or (B,) ints; count: M, needed only where neither index nor weight tells and M < V.
    Indices outside their tables are clamped. Returns (B, M): float32, or float64 in FLOAT64."""
    A = arithmetic
    x, basis = np.asarray(x, A.dtype), np.asarray(basis, A.dtype)
    M = next((a.shape[1] for a in (index, weight) if a is not None), len(basis) if count is None else count)
    rows = np.broadcast_to(np.clip(row, 0, len(gain) - 1), len(x))
    out = np.zeros((len(x), M), A.dtype)
    for b, r in enumerate(rows):
        v = np.arange(M) if index is None else np.clip(index[b], 0, len(basis) - 1)
        used = np.full(M, True) if weight is None else weight[b] != 0
        needed = used & (gain[r, v] != 0)
        value = np.where(used, offset[r, v], 0).astype(A.dtype)
        value[needed] = A.fma(gain[r, v[needed]].astype(A.dtype), dot(basis[v[needed]], x[b], A), value[needed])
        out[b, used] = (value if weight is None else A.scaled(weight[b], value))[used]
    return A.store(out, "float32")


def lift(basis, index, weight, *, arithmetic=EXACT):
    """basis: (V, n); index: (B, M) int or None; weight: (B, M). Indices outside the basis are clamped. Returns (B, n): float32, or
    float64 in FLOAT64."""
    A = arithmetic
    basis = np.asarray(basis, A.dtype)
    out = np.full((len(weight), basis.shape[1]), -0.0, A.dtype)
    for b in range(len(weight)):
        for v, w in terms(None if index is None else index[b], weight[b], len(basis)):
            out[b] = A.fma(A.dtype(w), basis[v], out[b])
    return A.store(out, "float32")
