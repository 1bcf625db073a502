"""Standard normals from Philox words: Box-Muller in float32 as a fixed sequence of IEEE operations.

No library function takes part, so that every backend returns the same bits. ``docs/noise.md`` holds the sequence, its
error and its tail. Four words give four normals: (w0, w1) a pair, (w2, w3) a pair, cosine first.
"""

import numpy as np

from .float32 import fma
from .philox import raw_words

__all__ = ["COS", "LOG", "SIN", "box_muller", "box_muller64", "normal", "uniform"]

F = np.float32

# -2 ln(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1]: weighted minimax, relative error 1.1e-6.
LOG = tuple(F(c) for c in (-2.000001907348633, 1.000022292137146, -0.6662901639938354, 0.49819502234458923,
                           -0.40992698073387146, 0.3733559846878052, -0.2379191517829895))
# sin(2 pi t) / t and (cos(2 pi t) - 1) / t^2 as polynomials in t^2, |t| <= 1/8: absolute errors 1.2e-9 and 3.2e-8.
SIN = tuple(F(c) for c in (6.283185005187988, -41.34162902832031, 81.58812713623047, -75.24006652832031))
COS = tuple(F(c) for c in (-19.739168167114258, 64.92322540283203, -83.6659164428711))
_MINUS_2_LN2 = F(-1.3862943611198906)
_ROUND = F(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer and leaves that integer in the low bits
_SQRT_HALF = np.int32(0x3F3504F3)


def uniform(words):
    """uint32 to float32 in (0, 1]: ``fma(float(r), 2^-32, 2^-33)``, the conversion rounded to nearest even."""
    return fma(words.astype(np.float32), F(2.0**-32), F(2.0**-33))


def _horner(coefficients, x):
    value = np.broadcast_to(coefficients[-1], x.shape)
    for c in coefficients[-2::-1]:
        value = fma(value, x, c)
    return value


def _radius(u):
    """sqrt(-2 ln u)"""
    bits = u.view(np.int32)
    exponent = (bits - _SQRT_HALF) >> np.int32(23)
    f = (bits - (exponent << np.int32(23))).view(np.float32) - F(1)
    square = fma(exponent.astype(np.float32), _MINUS_2_LN2, f * _horner(LOG, f))
    return np.sqrt(square)


def _circle(u):
    """cos(2 pi u), sin(2 pi u)"""
    shifted = fma(u, F(4), _ROUND)
    t = fma(shifted - _ROUND, F(-0.25), u)
    w = t * t
    sine, cosine = t * _horner(SIN, w), fma(w, _horner(COS, w), F(1))
    quarter = shifted.view(np.uint32)
    odd = (quarter & np.uint32(1)).astype(bool)
    c, s = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    c = c.view(np.uint32) ^ (((quarter + np.uint32(1)) << np.uint32(30)) & np.uint32(0x80000000))
    s = s.view(np.uint32) ^ ((quarter << np.uint32(30)) & np.uint32(0x80000000))
    return c.view(np.float32), s.view(np.float32)


def box_muller(words):
    """words: (..., 4k) uint32, whole Philox blocks. Returns float32 of the same shape."""
    u = uniform(words).reshape(*words.shape[:-1], words.shape[-1] // 4, 2, 2)
    radius = _radius(np.ascontiguousarray(u[..., 0]))
    c, s = _circle(np.ascontiguousarray(u[..., 1]))
    return np.stack([radius * c, radius * s], axis=-1).reshape(words.shape)


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
