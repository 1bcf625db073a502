"""Standard normals for Triton: Box-Muller as the fixed sequence of IEEE float32 operations of ``csrc/normal.h``.

Only fma, mul, add, sub and integer operations; kernels are compiled with fp fusion off, so that the compiler joins no
multiplication with an addition.
"""

import triton
import triton.language as tl

from ..checks import check_normal
from .launch import geometry, run
from .philox import philox
from .tile import join4, join8, store

__all__ = ["box_muller", "normal_", "normal_tile"]


@triton.jit
def _minus_2_log(word):
    """-2 ln u, u = (float(word) + 1/2) / 2^32"""
    bits = (word.to(tl.float32) + 0.5).to(tl.uint32, bitcast=True)
    k = ((bits >> 23) + 0x4B000000).to(tl.float32, bitcast=True) - 8388766.0
    x = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(x, -2.3718159198760986, -1.9029700756072998)
    q = tl.fma(q, x, -1.4325278997421265)
    q = tl.fma(q, x, 0.26047030091285706)
    q = tl.fma(q, x, -0.694304883480072)
    q = tl.fma(q, x, 0.9986182451248169)
    q = tl.fma(q, x, -2.0000197887420654)
    return tl.fma(k, -1.3862943611198906, x * q)


@triton.jit
def _signed_sqrt(v, word):
    """sqrt(v), v >= 0, negative where the lowest bit of the word is set"""
    half = tl.sub(0xBE620000, v.to(tl.uint32, bitcast=True), sanitize_overflow=False) >> 1
    y = (half | (word << 31)).to(tl.float32, bitcast=True)
    g = v * y
    # The sign is flipped as a bit: some versions of Triton negate by subtracting from 0.
    minus = (g.to(tl.uint32, bitcast=True) ^ 0x80000000).to(tl.float32, bitcast=True)
    e = tl.fma(minus, y, 1.0)
    p = tl.fma(e, 0.3580171763896942, 0.3036709725856781)
    p = tl.fma(p, e, 0.37535253167152405)
    p = tl.fma(p, e, 0.4999956786632538)
    return tl.fma(g * e, p, g)


@triton.jit
def _pair(first, second):
    """r cos(2 pi u), r sin(2 pi u) with r from the first word, u = float(second) / 2^32"""
    u = second.to(tl.float32)
    shifted = tl.fma(u, 9.313225746154785e-10, 25165824.0)  # 2^-30; leaves the nearest half turn in the low bits
    t = tl.fma(u, 9.313225746154785e-10, 25165824.0 - shifted)
    r = _signed_sqrt(_minus_2_log(first), shifted.to(tl.uint32, bitcast=True))
    w = t * t
    s = tl.fma(w, -5.07010227011051e-05, 0.0035211509093642235)
    s = tl.fma(s, w, -0.11419116705656052)
    s = tl.fma(s, w, 0.11072071641683578)
    s = tl.fma(t, s, t)
    c = tl.fma(w, -0.00044974935008212924, 0.02241302654147148)
    c = tl.fma(c, w, -0.43617668747901917)
    c = tl.fma(c, w, 0.4142133891582489)
    rs = r * s
    minus = (rs.to(tl.uint32, bitcast=True) ^ 0x80000000).to(tl.float32, bitcast=True)
    return tl.fma(minus, s, r), tl.fma(rs, c, rs)


@triton.jit
def box_muller(w0, w1, w2, w3):
    """The four words of Philox calls to four normals, cosine first."""
    z0, z1 = _pair(w0, w1)
    z2, z3 = _pair(w2, w3)
    return z0, z1, z2, z3


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
