"""``project_`` for Triton, in one launch: ``fastdiff/reference/project.py`` says what it means.

A program owns one sample and a few vectors. It goes over their chunks, and keeps the second level of the tree in registers.
"""

import triton
import triton.language as tl

from ..vector_checks import check_project
from .launch import geometry, grid, interpreted, run
from .reduce import CHUNK, LANES, any_of, load_lanes, pairwise
from .tile import narrow

__all__ = ["project_"]

TERMS = 8  # of a program: 16 lanes a thread with 4 warps
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
):  # fmt: skip
    """Program (x, y, z): terms x TERMS .. x TERMS + TERMS - 1 of sample y + z num_programs(1)."""
    b = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    if b >= batch:
        return
    m = tl.program_id(0) * TERMS + tl.arange(0, TERMS)
    there = m < terms
    used = there
    w = tl.full([TERMS], 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + b * weight_stride + m, mask=there, other=0.0)
        used = w != 0.0
    at_index = index
    if index is not None:
        at_index = index + b * index_stride
    v = vector_numbers(at_index, m, there, vectors, index is not None)
    if row is None:
        r = row_index.to(tl.int64)
    else:
        r = tl.load(row + b * row_stride).to(tl.int64)
    r = tl.minimum(tl.maximum(r, 0), rows - 1)
    g = tl.load(gain + r * gain_stride + v, mask=used, other=0.0)
    value = tl.load(offset + r * offset_stride + v, mask=used, other=0.0)
    needed = g != 0.0

    chunks = tl.cdiv(numel, _CHUNK) * any_of(needed)
    sample = x + b * x_stride + tl.arange(0, 1)
    read = tl.full([1], True, tl.int1)
    vector = basis + v * basis_stride
    total = tl.full([TERMS, _LANES], 0.0, tl.float32)
    for c in range(chunks):
        lanes = tl.full([TERMS, _LANES], 0.0, tl.float32)
        for part in tl.static_range(_CHUNK // _LANES):
            first = tl.cast(c, tl.int64) * _CHUNK + part * _LANES
            values = load_lanes(sample, first, numel, read, inner, groups, X_MODE, LARGE, V)
            lanes = tl.fma(load_lanes(vector, first, numel, needed, inner, groups, BASIS_MODE, LARGE, V), values, lanes)
        here = (c - tl.arange(0, _LANES)) & (_LANES - 1) == 0
        total = tl.where(here[None, :], total + pairwise(lanes)[:, None], total)
    value = tl.where(needed, tl.fma(g, pairwise(total), value), value)
    if weight is not None:
        value = tl.where(used, w * value, 0.0)
    tl.store(out + b * out_stride + m.to(tl.int64) * out_stride_term, narrow(value, tl.float32), mask=there)


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
    terms = 2 if interpreted() else TERMS
    return grid(triton.cdiv(out.shape[1], terms), g.batch), (
        out, stride(out), stride(out, 1), x, stride(x), basis, stride(basis), len(basis), index, stride(index),
        gain, stride(gain), offset, stride(offset), weight, stride(weight), row, row_index, stride(row), len(gain),
        g.batch, out.shape[1], g.numel, g.inner, g.groups,
    ), dict(X_MODE=g.modes[0], BASIS_MODE=g.modes[1], LARGE=g.large, V=g.V, TERMS=terms, num_warps=4)  # fmt: skip
