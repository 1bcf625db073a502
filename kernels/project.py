"""``project_`` for Triton, in one launch: ``fastdiff/reference/project.py`` says what it means.

A program is one warp, and owns one sample and a few vectors. It goes over their chunks, and keeps the second level of the tree in
registers: no value goes through shared memory.
"""

import triton
import triton.language as tl

from ..vector_checks import check_project
from .launch import geometry, grid, interpreted, run
from .reduce import CHUNK, LANES, load_lanes, pairwise
from .tile import WIDE, narrow

__all__ = ["project_"]

# Rows of 256 elements at once, by terms of a program: as much as registers hold on every target, of samples that are read 16 bytes at
# a time and of others, whose addresses and masks take registers too.
UNROLL, UNROLL_NARROW = {1: 8, 2: 4, 4: 1}, {1: 4, 2: 2}
_CHUNK, _LANES = tl.constexpr(CHUNK), tl.constexpr(LANES)


@triton.jit
def vector_numbers(index, m, there, vectors, HAS_INDEX: tl.constexpr):
    """The vectors of terms m, the nearest ones where there is none of that number, as int64. index: pointer to the sample's."""
    v = m
    if HAS_INDEX:
        v = tl.load(index + m, mask=there, other=0)
    return tl.minimum(tl.maximum(v.to(tl.int64), 0), vectors - 1)


@triton.jit(do_not_specialize=list(range(25)))
def project_kernel(
    out, out_stride, out_stride_term, x, x_stride, basis, basis_stride, vectors, index, index_stride,
    gain, gain_stride, offset, offset_stride, weight, weight_stride, row, row_index, row_stride, rows,
    batch, terms, numel, inner, groups,
    X_MODE: tl.constexpr, BASIS_MODE: tl.constexpr, LARGE: tl.constexpr, V: tl.constexpr, TERMS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Program (x, y, z): terms x TERMS .. x TERMS + TERMS - 1 of sample y + z num_programs(1), each in registers of its own."""
    b = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    if b >= batch:
        return
    at_index, at_weight = index, weight
    if index is not None:
        at_index = index + b * index_stride
    if weight is not None:
        at_weight = weight + b * weight_stride
    if row is None:
        r = row_index.to(tl.int64)
    else:
        r = tl.load(row + b * row_stride).to(tl.int64)
    r = tl.minimum(tl.maximum(r, 0), rows - 1)

    weights, gains, offsets, bases, totals = (), (), (), (), ()
    needed = 0
    for j in tl.static_range(TERMS):
        m = tl.program_id(0) * TERMS + j
        w = tl.where(m < terms, 1.0, 0.0)
        if weight is not None:
            w = tl.load(at_weight + m, mask=m < terms, other=0.0)
        v = vector_numbers(at_index, m, m < terms, vectors, index is not None)
        g = tl.load(gain + r * gain_stride + v, mask=w != 0.0, other=0.0)
        weights, gains = weights + (w,), gains + (g,)
        offsets = offsets + (tl.load(offset + r * offset_stride + v, mask=w != 0.0, other=0.0),)
        bases = bases + (basis + v * basis_stride + tl.arange(0, 1),)
        totals = totals + (tl.full([1, _LANES], 0.0, tl.float32),)
        needed = needed | (g != 0.0).to(tl.int32)

    sample = x + b * x_stride + tl.arange(0, 1)
    one = tl.full([1], True, tl.int1)
    for c in range(tl.cdiv(numel, _CHUNK) * needed):
        sums = ()
        for j in tl.static_range(TERMS):
            sums = sums + (tl.full([1, _LANES], 0.0, tl.float32),)
        for part in tl.range(_CHUNK // _LANES, loop_unroll_factor=UNROLL):
            first = tl.cast(c, tl.int64) * _CHUNK + part * _LANES
            values = load_lanes(sample, first, numel, one, inner, groups, X_MODE, LARGE, V)
            further = ()
            for j in tl.static_range(TERMS):
                vector = load_lanes(bases[j], first, numel, one & (gains[j] != 0.0), inner, groups, BASIS_MODE, LARGE, V)
                further = further + (tl.fma(vector, values, sums[j]),)
            sums = further
        here = ((c - tl.arange(0, _LANES)) & (_LANES - 1) == 0)[None, :]
        further = ()
        for j in tl.static_range(TERMS):
            further = further + (tl.where(here, totals[j] + pairwise(sums[j])[:, None], totals[j]),)
        totals = further

    for j in tl.static_range(TERMS):
        m = tl.program_id(0) * TERMS + j
        g, value = tl.full([1], 0.0, tl.float32) + gains[j], tl.full([1], 0.0, tl.float32) + offsets[j]
        value = tl.where(g != 0.0, tl.fma(g, pairwise(totals[j]), value), value)
        if weight is not None:
            value = tl.where(weights[j] != 0.0, weights[j] * value, 0.0)
        at = out + b * out_stride + m.to(tl.int64) * out_stride_term + tl.arange(0, 1)
        tl.store(at, narrow(value, tl.float32), mask=one & (m < terms))


def project_(out, x, basis, index, gain, offset, weight, row, row_index):
    """out (B, M) = weight (gain <basis[index], x> + offset), gain and offset (N, V) by row ``row`` (a tensor () or (B,)), or
    ``row_index`` where it is None; x: (B, *shape), basis: (V, *shape), index and weight: (B, M) or None."""
    args = (out, x, basis, index, gain, offset, weight, row, row_index)
    check_project(*args)
    if out.numel():
        programs, positional, options = arguments(*args)
        run(project_kernel, out.device, programs, *positional, **options)


def stride(t, d=0):
    return t.stride(d) if t is not None and t.dim() > d and t.shape[d] > 1 else 0


def arguments(out, x, basis, index, gain, offset, weight, row, row_index):
    """What ``project_kernel`` is launched with: (grid, positional arguments, options)."""
    g = geometry([x], others=[basis], axes=[1])
    unroll = UNROLL if g.modes == (WIDE, WIDE) else UNROLL_NARROW
    terms = min(2 if interpreted() else max(unroll), triton.next_power_of_2(out.shape[1]))
    return grid(triton.cdiv(out.shape[1], terms), g.batch), (
        out, stride(out), stride(out, 1), x, stride(x), basis, stride(basis), len(basis), index, stride(index),
        gain, stride(gain), offset, stride(offset), weight, stride(weight), row, row_index, stride(row), len(gain),
        g.batch, out.shape[1], g.numel, g.inner, g.groups,
    ), dict(X_MODE=g.modes[0], BASIS_MODE=g.modes[1], LARGE=g.large, V=g.V, TERMS=terms, UNROLL=unroll[terms],
            num_warps=1)  # fmt: skip
