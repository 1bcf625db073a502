"""A quantile of |d| for each sample, and the bounds of dynamic thresholding: what every backend of ``fastdiff::quantile_``
computes.

For sample b, with d the sum that ``step.py`` takes from the inputs of its row, without steering and masks:

    d       = sum_k p_k s_bk v_k                             in every bit the d of the step that is given the same row
    rank    = q (n - 1)                                      of n elements
    out_b   = lerp(a, c, rank - floor(rank))                 a, c: elements floor(rank) and ceil(rank) of |d| in ascending order
    clip_b  = (-t, t, 1 / t),  t = out_b limited to low and high

``clip`` is what ``step_`` takes: its d becomes clip(d, -t, t) / t (Saharia et al., arXiv:2205.11487, section 2.3).

Arithmetic. That of ``torch.quantile(d.abs().flatten(1), q, dim=1)``, in every bit: q and rank are float32, up to n = 2^24, where
torch ends. Beyond it float32 no longer tells elements apart, and rank is float64; its fraction w is rounded to float32. lerp is
fma(w, c - a, a) for w < 0.5, else fma(w - 1, c - a, c): so two infinities give NaN, as in torch. NaN among the elements gives NaN.
Limits compare and select, low first, so NaN stays NaN and of two that cross the upper one counts, as in ``torch.clamp``; 1 / t is
correctly rounded. NaN is stored as the canonical quiet NaN.
"""

import math

import numpy as np

from .step import EXACT, NO_SLOT, Layout, step

__all__ = ["position", "quantile"]

FLOAT32_RANKS = 2**24  # samples of up to so many elements have a rank in float32


def position(n, q):
    """(k, k', w): the quantile q of n elements in ascending order lies from element k on w of the way to element k'. w: float32"""
    rank = np.float32(q) * np.float32(n - 1) if n <= FLOAT32_RANKS else np.float64(q) * (n - 1)
    below = math.floor(rank)
    return below, math.ceil(rank), np.float32(rank - below)


def quantile(inputs, coef, row, q, *, scale=None, low=1.0, high=math.inf, arithmetic=EXACT):
    """inputs: K arrays (B, n), n at least 1, widened to float32 (or float64); coef: (N, at least K) float32, the table of a plan or
    its first K columns; row: int or (B,); scale: (B, K) or None; q: 0 to 1; low, high: limits of t. A row outside the table is
    clamped. Returns (B,) and (B, 3), float32, or float64 in FLOAT64."""
    A, K = arithmetic, len(inputs)
    table = np.zeros((len(coef), Layout(K, 0).width), A.dtype)
    table[:, :K] = coef[:, :K]
    meta = np.full((len(coef), 4), [NO_SLOT, 0, 0, 0], np.int32)
    size = np.abs(step(inputs, table, meta, row, outputs=(), scale=scale, arithmetic=A).d)
    below, above, w = position(size.shape[1], q)
    ordered = np.partition(size, (below, above), axis=1)  # NaN comes last
    a, c = ordered[:, below], ordered[:, above]
    with np.errstate(all="ignore"):
        value = A.fma(w, c - a, a) if w < 0.5 else A.fma(w - A.dtype(1), c - a, c)
        value = np.where(np.isnan(size).any(axis=1), A.dtype(np.nan), value)
        t = np.where(value < A.dtype(low), A.dtype(low), value)
        t = np.where(t > A.dtype(high), A.dtype(high), t)
        clip = np.stack([-t, t, A.dtype(1) / t], axis=1)
    return A.store(value, "float32"), A.store(clip, "float32")
