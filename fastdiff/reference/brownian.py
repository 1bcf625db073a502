"""A Brownian path W(sigma) from addressed normals: what a plan's weights stand for. ``docs/noise.md`` defines it.

W is 0 at the lower border of an octave [2^k, 2^(k + 1)] that lies below all that is asked for, has an increment of its own
over every octave, and is a Brownian bridge inside of it: from W at the ends a < b of a cell,

    W(m) = W(a) (b - m) / (b - a) + W(b) (m - a) / (b - a) + sqrt((m - a) (b - m) / (b - a)) N(node),    m = sqrt(a b)

and the two halves of the cell in the same way. Everything in float64, values first: no weights.
"""

import math

import numpy as np

from .normal import normal
from .philox import run_keys

__all__ = ["path"]

_STREAM, _OCTAVES = 4, 2048


def path(seeds, sigma, depth, count, lowest=-40):
    """(B, count) float64: W(sigma) - W(2^lowest), of elements 0..count-1 of each sample.

    seeds: (B,) int64; sigma: above 2^lowest; depth: after how many bridges the last one goes to sigma itself, in place of
    its cell's middle; 0 for a level that is a power of two.
    """

    def draw(octave, node):
        keys = run_keys(np.asarray(seeds, np.int64), [[_STREAM]], [[(octave + _OCTAVES) * 2**32 + node]])[0, 0]
        return normal(keys, count, exact=False)

    octave = math.frexp(sigma)[1] - 1
    low, high, node = 2.0**octave, 2.0 ** (octave + 1), 1
    at_low = sum((math.sqrt(2.0**k) * draw(k, 0) for k in range(lowest, octave)), np.zeros((len(seeds), count)))
    at_high = at_low + math.sqrt(2.0**octave) * draw(octave, 0)
    for left in range(depth, 0, -1):
        point = sigma if left == 1 else math.sqrt(low * high)
        mean = (at_low * (high - point) + at_high * (point - low)) / (high - low)
        value = mean + math.sqrt((point - low) * (high - point) / (high - low)) * draw(octave, node)
        if left == 1:
            return value
        node, low, high, at_low, at_high = (
            (2 * node + 1, point, high, value, at_high) if sigma >= point else (2 * node, low, point, at_low, value)
        )
    return at_low
