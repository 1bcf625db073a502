"""``edit_`` for Triton, in two launches: ``fastdiff/reference/edit.py`` says what it means.

The first takes the sum of squares of every chunk. In the second each program adds them up to the norm of its sample, and adds the
vectors to its tile: nothing is waited for in between but the first launch. A program is one warp, so that no sum goes through shared
memory.
"""

import torch
import triton
import triton.language as tl

from ..vector_checks import check_edit
from .launch import geometry, grid, run
from .lift import add_terms, at_once
from .project import stride
from .reduce import CHUNK, LANES, any_of, load_lanes, pairwise, second_level
from .tile import load, narrow, store

__all__ = ["edit_"]

_CHUNK, _LANES = tl.constexpr(CHUNK), tl.constexpr(LANES)


@triton.jit(do_not_specialize=list(range(11)))
def squares_kernel(sums, h, h_stride, weight, weight_stride, terms, batch, chunks, numel, inner, groups, MODE: tl.constexpr,
                   LARGE: tl.constexpr, V: tl.constexpr):
    """Program (x, y, z): the sum of squares of chunk x of sample y + z num_programs(1), where that has a weight."""
    b = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    if b >= batch:
        return
    used = 0
    for start in range(0, terms, _LANES):
        m = start + tl.arange(0, _LANES)
        used = used | any_of(tl.load(weight + b * weight_stride + m, mask=m < terms, other=0.0) != 0.0)
    if used == 0:
        return
    sample = h + b * h_stride + tl.arange(0, 1)
    read = tl.full([1], True, tl.int1)
    lanes = tl.full([1, _LANES], 0.0, tl.float32)
    for part in tl.static_range(_CHUNK // _LANES):
        first = tl.program_id(0).to(tl.int64) * _CHUNK + part * _LANES
        value = load_lanes(sample, first, numel, read, inner, groups, MODE, LARGE, V)
        lanes = tl.fma(value, value, lanes)
    tl.store(sums + b * chunks + tl.program_id(0) + tl.arange(0, 1), pairwise(lanes))


@triton.jit(do_not_specialize=list(range(18)))
def edit_kernel(out, out_stride, h, h_stride, bank, bank_stride, vectors, index, index_stride, weight, weight_stride, sums, chunks,
                terms, batch, numel, inner, groups, OUT_MODE: tl.constexpr, H_MODE: tl.constexpr, BANK_MODE: tl.constexpr,
                LARGE: tl.constexpr, QUADS: tl.constexpr, V: tl.constexpr, TERMS: tl.constexpr):
    """Program (x, y, z): tile x of sample y + z num_programs(1)."""
    b = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    if b >= batch:
        return
    first = tl.program_id(0).to(tl.int64) * (QUADS * V)
    row = tl.arange(0, QUADS) * V
    high = tl.minimum(numel - first, QUADS * V).to(tl.int32)
    at_index = index
    if index is not None:
        at_index = index + b * index_stride
    was = load(h + b * h_stride, first, row, 0, high, True, inner, groups, H_MODE, LARGE, V, WIDEN=False)
    norm = tl.sqrt_rn(second_level(sums + b * chunks, chunks))
    total, met = add_terms(was.to(tl.float32), norm, bank, bank_stride, vectors, at_index, weight + b * weight_stride, terms, first, row, high,
                           inner, groups, index is not None, BANK_MODE, LARGE, V, TERMS)
    stored = narrow(total, out.dtype.element_ty)
    if out.dtype.element_ty == h.dtype.element_ty:
        stored = tl.where(met[:, None], stored, was)  # without a term every bit stays, that of a NaN too
    store(out + b * out_stride, first, row, 0, high, True, stored, inner, groups, OUT_MODE, LARGE, V, NARROW=False)


def edit_(out, h, bank, index, weight):
    """out = h + sum_m weight |h| bank[index]; out, h: (B, *shape), bank: (V, *shape), weight: (B, M), index: (B, M) or None."""
    check_edit(out, h, bank, index, weight)
    if out.numel():
        sums = torch.empty((len(h), triton.cdiv(h[0].numel(), CHUNK)), device=h.device)
        for kernel, (programs, positional, options) in zip((squares_kernel, edit_kernel), arguments(sums, out, h, bank, index, weight)):
            run(kernel, out.device, programs, *positional, **options)


def arguments(sums, out, h, bank, index, weight):
    """What the two kernels are launched with, each (grid, positional arguments, options). sums: (B, chunks) float32"""
    g, terms, chunks = geometry([h]), weight.shape[1], sums.shape[1]
    squares = grid(chunks, g.batch), (
        sums, h, stride(h), weight, stride(weight), terms, g.batch, chunks, g.numel, g.inner, g.groups,
    ), dict(MODE=g.modes[0], LARGE=g.large, V=g.V, num_warps=1)  # fmt: skip
    g = geometry([out, h], others=[bank], axes=[1], noisy=False)
    edit = g.grid, (
        out, stride(out), h, stride(h), bank, stride(bank), len(bank), index, stride(index), weight, stride(weight), sums, chunks, terms,
        g.batch, g.numel, g.inner, g.groups,
    ), dict(OUT_MODE=g.modes[0], H_MODE=g.modes[1], BANK_MODE=g.modes[2], LARGE=g.large, QUADS=g.quads, V=g.V,
            TERMS=min(2, at_once(terms)), num_warps=1)  # fmt: skip
    return squares, edit
