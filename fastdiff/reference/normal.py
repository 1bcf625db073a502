"""Standard normals from Philox words: Box-Muller in float32 as a fixed sequence of IEEE operations.

No library function takes part, so that every backend returns the same bits. ``docs/noise.md`` holds the sequence, its
error and its tail. Four words give four normals: (w0, w1) a pair, (w2, w3) a pair, cosine first.
"""

import numpy as np

from .float32 import fma
from .philox import raw_words

__all__ = ["COS", "LOG", "SIN", "box_muller", "box_muller64", "normal", "uniform"]

F = np.float32

# Weighted minimax fits, rounded to float32.
# -2 ln(1 + x) / x on [-1/2, 0), with the value at -1/2 that makes -2 ln 1 exactly 0: 3.4e-7 of the radius.
LOG = tuple(F(c) for c in (-2.0000197887420654, 0.9986182451248169, -0.694304883480072, 0.26047030091285706,
                           -1.4325278997421265, -1.9029700756072998, -2.3718159198760986))
# ((1 - e)^(-1/2) - 1) / e for the error e of the first estimate, in [-0.003, 0.118]: relative error 1.6e-8 of the root.
ROOT = tuple(F(c) for c in (0.4999956786632538, 0.37535253167152405, 0.3036709725856781, 0.3580171763896942))
# sqrt(2) sin(pi t / 4) / t - 1 and sqrt(2) cos(pi t / 4) - 1 as polynomials in t^2, |t| <= 1: 2.1e-9 and 2.1e-8.
SIN = tuple(F(c) for c in (0.11072071641683578, -0.11419116705656052, 0.0035211509093642235, -5.07010227011051e-05))
COS = tuple(F(c) for c in (0.4142133891582489, -0.43617668747901917, 0.02241302654147148, -0.00044974935008212924))
_MINUS_2_LN2 = F(-1.3862943611198906)
_ROUND = F(25165824.0)  # 1.5 * 2^24: adding it rounds to an even number and leaves half of that in the low bits
_BIAS = F(2.0**23 + 126 + 32)  # what 2^23 plus a float's exponent field reads as for the number 1, scaled by 2^32
_SEED = np.uint32(0xBE620000)  # for (_SEED - bits(v)) >> 1, the bits of an estimate of 1 / sqrt(v)


def uniform(words):
    """uint32 to float32 in (0, 1]: ``fma(float(r), 2^-32, 2^-33)``, the conversion rounded to nearest even."""
    return fma(words.astype(np.float32), F(2.0**-32), F(2.0**-33))


def _horner(coefficients, x):
    value = np.broadcast_to(coefficients[-1], x.shape)
    for c in coefficients[-2::-1]:
        value = fma(value, x, c)
    return value


def _minus_2_log(words):
    """-2 ln u, u = (float(word) + 1/2) / 2^32"""
    bits = (words.astype(np.float32) + F(0.5)).view(np.uint32)
    k = ((bits >> np.uint32(23)) + np.uint32(0x4B000000)).view(np.float32) - _BIAS
    x = ((bits & np.uint32(0x007FFFFF)) | np.uint32(0x3F000000)).view(np.float32) - F(1)
    return fma(k, _MINUS_2_LN2, x * _horner(LOG, x))


def _signed_sqrt(v, words):
    """sqrt(v), v >= 0, negative where the lowest bit of the word is set"""
    with np.errstate(over="ignore"):
        half = (_SEED - v.view(np.uint32)) >> np.uint32(1)
    y = (half | words << np.uint32(31)).view(np.float32)
    g = v * y
    e = fma(-g, y, F(1))
    return fma(g * e, _horner(ROOT, e), g)


def _pair(first, second):
    """r cos(2 pi u), r sin(2 pi u) with r from the first word, u = float(second) / 2^32"""
    u = second.astype(np.float32)
    shifted = fma(u, F(2.0**-30), _ROUND)
    t = fma(u, F(2.0**-30), _ROUND - shifted)
    r = _signed_sqrt(_minus_2_log(first), shifted.view(np.uint32))
    w = t * t
    s, c = fma(t, _horner(SIN, w), t), _horner(COS, w)
    rs = r * s
    return fma(-rs, s, r), fma(rs, c, rs)


def box_muller(words):
    """words: (..., 4k) uint32, whole Philox blocks. Returns float32 of the same shape."""
    w = words.reshape(*words.shape[:-1], words.shape[-1] // 4, 2, 2)
    pair = _pair(np.ascontiguousarray(w[..., 0]), np.ascontiguousarray(w[..., 1]))
    return np.stack(pair, axis=-1).reshape(words.shape)


def box_muller64(words):
    """The same map in float64 from the same float32 uniforms: what the float32 sequence approximates."""
    u = uniform(words).astype(np.float64).reshape(*words.shape[:-1], words.shape[-1] // 4, 2, 2)
    radius, angle = np.sqrt(-2 * np.log(u[..., 0])), 2 * np.pi * u[..., 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(words.shape)


def normal(keys, count, first=0, exact=True):
    """Elements first..first+count-1 of N(key). keys: (..., 2) int64. Returns (..., count) float32 (float64 if not exact)."""
    start = first // 4 * 4
    stop = (first + count + 3) // 4 * 4
    values = (box_muller if exact else box_muller64)(raw_words(keys, start, stop - start))
    return values[..., first - start : first - start + count]
