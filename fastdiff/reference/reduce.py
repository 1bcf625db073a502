"""The fixed tree: the one order in which the elements of a sample are summed, whatever the backend, the number of threads or the
batch around the sample.

Elements are numbered by their logical index e. A sample is cut into chunks of 2048 elements. In a chunk, lane l of 256 starts at
+0.0 and takes the products of its elements e = l (mod 256) in order, one fma each; what a last chunk lacks is left out. The 256
lanes are added pairwise, a[i] + a[i + 128], then a[i] + a[i + 64], ..., a[i] + a[i + 1]: S_c, the sum of chunk c. On the second
level lane l of 256 starts at +0.0 and adds S_l, S_(l+256), ... in order; the lanes are added as before. All float32.

The sum is never -0.0, since the lanes of the second level are not. So a backend may give missing elements any product of zero.
"""

import numpy as np

from .step import EXACT

__all__ = ["CHUNK", "LANES", "chunk_sums", "combine", "dot", "norm"]

CHUNK, LANES = 2048, 256


def _cut(values, step, fill):
    """(..., n) to (..., ceil(n / step), step), what is missing being ``fill``."""
    pieces = -(-values.shape[-1] // step)
    pad = [(0, 0)] * (values.ndim - 1) + [(0, pieces * step - values.shape[-1])]
    return np.pad(values, pad, constant_values=fill).reshape(*values.shape[:-1], pieces, step)


def _pairwise(lanes):
    """(..., 256) to (...): the upper half is added to the lower one until one lane is left."""
    with np.errstate(all="ignore"):
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def chunk_sums(a, b, arithmetic=EXACT):
    """The sums S_c of a_e b_e over the chunks. a, b: (..., n), broadcasting. Returns (..., ceil(n / 2048))."""
    A = arithmetic
    a, b = np.broadcast_arrays(np.asarray(a, A.dtype), np.asarray(b, A.dtype))
    a = _cut(_cut(a, CHUNK, A.dtype(-0.0)), LANES, 0)  # -0.0 times 0.0 is -0.0: an fma with it changes nothing
    b = _cut(_cut(b, CHUNK, A.dtype(0.0)), LANES, 0)
    lanes = np.zeros((*a.shape[:-2], LANES), A.dtype)
    for row in range(CHUNK // LANES):
        lanes = A.fma(a[..., row, :], b[..., row, :], lanes)
    return _pairwise(lanes)


def combine(sums):
    """The second level: the sum of a sample from those of its chunks. sums: (..., chunks). Returns (...)."""
    sums = np.asarray(sums)
    rows = _cut(sums, LANES, sums.dtype.type(-0.0))
    lanes = np.zeros((*sums.shape[:-1], LANES), sums.dtype)
    with np.errstate(all="ignore"):
        for row in range(rows.shape[-2]):
            lanes = lanes + rows[..., row, :]
    return _pairwise(lanes)


def dot(a, b, arithmetic=EXACT):
    """sum_e a_e b_e in the fixed tree. a, b: (..., n), broadcasting. Returns (...), never -0.0."""
    return combine(chunk_sums(a, b, arithmetic))


def norm(a, arithmetic=EXACT):
    """sqrt(sum_e a_e^2), the sum in the fixed tree, the root correctly rounded. a: (..., n). Returns (...)."""
    with np.errstate(all="ignore"):
        return np.sqrt(dot(a, a, arithmetic))
