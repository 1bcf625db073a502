"""Standard normals for Triton: Box-Muller as the fixed sequence of IEEE float32 operations of ``csrc/normal.h``.

Only fma, mul, add, correctly rounded square root and integer operations; kernels are compiled with fp fusion off, so
that the compiler joins no multiplication with an addition.
"""

import triton
import triton.language as tl

from ..checks import check_normal
from .launch import geometry, run
from .philox import philox
from .tile import join4, join8, store

__all__ = ["box_muller", "normal_", "normal_tile"]


@triton.jit
def _uniform(word):
    """uint32 to (0, 1]"""
    return tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)


@triton.jit
def _radius(u):
    """sqrt(-2 ln u), u in (0, 1]"""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of u / sqrt(1/2)
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(x, -0.2379191517829895, 0.3733559846878052)
    q = tl.fma(q, x, -0.40992698073387146)
    q = tl.fma(q, x, 0.49819502234458923)
    q = tl.fma(q, x, -0.6662901639938354)
    q = tl.fma(q, x, 1.000022292137146)
    q = tl.fma(q, x, -2.000001907348633)
    return tl.sqrt_rn(tl.fma(exponent.to(tl.float32), -1.3862943611198906, x * q))


@triton.jit
def _circle(u):
    """cos(2 pi u), sin(2 pi u), u in (0, 1]"""
    shifted = tl.fma(u, 4.0, 12582912.0)  # leaves the nearest quarter turn in the low bits
    t = tl.fma(shifted - 12582912.0, -0.25, u)
    w = t * t
    s = tl.fma(w, -75.24006652832031, 81.58812713623047)
    s = tl.fma(s, w, -41.34162902832031)
    s = tl.fma(s, w, 6.283185005187988)
    s = t * s
    c = tl.fma(w, -83.6659164428711, 64.92322540283203)
    c = tl.fma(c, w, -19.739168167114258)
    c = tl.fma(w, c, 1.0)
    quarter = shifted.to(tl.uint32, bitcast=True)
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quarter + 1) << 30) & 0x80000000)
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quarter << 30) & 0x80000000)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(w0, w1, w2, w3):
    """The four words of Philox calls to four normals, cosine first."""
    r = _radius(_uniform(w0))
    c, s = _circle(_uniform(w1))
    q = _radius(_uniform(w2))
    d, t = _circle(_uniform(w3))
    return r * c, r * s, q * d, q * t


@triton.jit
def normal_tile(keys, first, row, V: tl.constexpr):
    """N(key) at the elements of a tile (quads, V). keys: pointer to the pair; first, row: see ``tile.load``."""
    seed = tl.load(keys).to(tl.uint64, bitcast=True)
    offset = tl.load(keys + 1).to(tl.uint64, bitcast=True)
    counter = offset + (first >> 2).to(tl.uint64) + (row >> 2).to(tl.uint64)
    w0, w1, w2, w3 = philox(seed, counter)
    z0, z1, z2, z3 = box_muller(w0, w1, w2, w3)
    if V == 4:
        return join4(z0, z1, z2, z3)
    else:
        w4, w5, w6, w7 = philox(seed, counter + 1)
        z4, z5, z6, z7 = box_muller(w4, w5, w6, w7)
        return join8(z0, z1, z2, z3, z4, z5, z6, z7)


@triton.jit(do_not_specialize=list(range(8)))
def normal_kernel(out, out_stride, keys, key_stride, batch, numel, inner, groups, MODE: tl.constexpr,
                  LARGE: tl.constexpr, QUADS: tl.constexpr, V: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (QUADS * V)
    b = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    row = tl.arange(0, QUADS) * V
    high = tl.minimum(numel - first, QUADS * V).to(tl.int32)
    if b < batch:
        value = normal_tile(keys + b * key_stride, first, row, V)
        store(out + b * out_stride, first, row, 0, high, True, value, inner, groups, MODE, LARGE, V)


def normal_(out, keys):
    """Fill out (B, *shape), float32, float16 or bfloat16, with N(key_b). keys: (B, 2) int64."""
    check_normal(out, keys)
    if out.numel() == 0:
        return
    g = geometry([out])
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    run(normal_kernel, out.device, g.grid, out, out.stride(0), keys, keys.stride(0), g.batch, g.numel, g.inner, g.groups,
        MODE=g.modes[0], LARGE=g.large, QUADS=g.quads, V=g.V, num_warps=g.num_warps)
