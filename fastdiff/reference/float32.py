"""IEEE binary32 arithmetic in NumPy, rounded the way the hardware instructions round.

NumPy adds, subtracts, multiplies and takes square roots of float32 arrays correctly rounded, but has no fused
multiply-add and no bfloat16. Both are here, written from the definition, so that a kernel can be compared bit by bit
on a machine that has neither.
"""

import numpy as np

__all__ = ["DTYPES", "fma", "narrow", "widen"]

DTYPES = ("float32", "float16", "bfloat16")

_CANONICAL_NAN = {"float32": np.uint32(0x7FC00000), "float16": np.uint16(0x7E00), "bfloat16": np.uint16(0x7FC0)}


def fma(a, b, c):
    """``a * b + c`` with one rounding to nearest even. float32 in, float32 out, broadcasting.

    The product of two float32 has at most 48 significant bits and is exact in float64. The sum is rounded to odd in
    float64 (Boldo and Melquiond, 2008), which makes the final rounding to float32 the only one that counts, results
    in the subnormal range included.
    """
    a, b, c = np.float32(a), np.float32(b), np.float32(c)
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)
        addend = c.astype(np.float64)
        total = product + addend
        # Knuth's two-sum: total + error is the exact sum.
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        bits = np.atleast_1d(total).view(np.int64).copy()
        error = np.atleast_1d(error)
        inexact = np.isfinite(error) & (error != 0) & ((bits & 1) == 0)
        # An even last bit and something lost: move one ulp towards the lost part, which is the odd neighbour.
        toward = np.where((error > 0) == (np.atleast_1d(total) > 0), 1, -1)
        bits = np.where(inexact, bits + toward, bits)
        return bits.view(np.float64).astype(np.float32).reshape(np.shape(total))


def widen(stored, dtype):
    """Values of a stored array as float32, exactly. bfloat16 is stored as uint16 bits.

    stored: float32, float16 or uint16 array; dtype: one of ``DTYPES``.
    """
    if dtype == "bfloat16":
        return (np.asarray(stored).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(all="ignore"):
        return np.asarray(stored).astype(np.float32)


def narrow(values, dtype):
    """Round float32 (or float64) values to ``dtype``, to nearest even; NaN becomes the canonical quiet NaN.

    Returns float32, float16, or uint16 bits for bfloat16.
    """
    values = np.asarray(values)
    nan = np.isnan(values)
    with np.errstate(all="ignore"):
        if dtype == "bfloat16":
            bits = values.astype(np.float32).view(np.uint32)
            out = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
            return np.where(nan, _CANONICAL_NAN[dtype], out)
        out = values.astype(dtype)
    bits = np.where(nan, _CANONICAL_NAN[dtype], out.view(_CANONICAL_NAN[dtype].dtype))
    return bits.view(dtype)
