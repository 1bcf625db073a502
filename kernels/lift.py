"""``lift_`` for Triton, in one launch: ``fastdiff/reference/project.py`` says what it means.

A program owns a tile of one sample. The vectors of several terms are on their way at once; they are added in order.
"""

import triton
import triton.language as tl

from ..vector_checks import check_lift
from .launch import geometry, interpreted, run
from .project import stride, vector_numbers
from .tile import load, store

__all__ = ["lift_"]

TERMS = 8  # vectors that are loaded before the first of them is added


@triton.jit
def add_terms(total, norm, vectors, vector_stride, count, index, weight, terms, first, row, high, inner, groups, HAS_INDEX: tl.constexpr,
              MODE: tl.constexpr, LARGE: tl.constexpr, V: tl.constexpr, TERMS: tl.constexpr):
    """total + sum_m c_m V_m on a tile, and whether there was a term. c_m is the weight, times ``norm`` (1,) where that is given; index
    and weight point to those of the sample. first, row, high: see ``tile.load``."""
    met = tl.full([1], False, tl.int1)
    for start in range(0, terms, TERMS):
        coefficients = ()
        values = ()
        for j in tl.static_range(TERMS):
            m = start + j
            w = tl.load(weight + m, mask=m < terms, other=0.0)
            c = tl.full([1], 0.0, tl.float32) + w
            if norm is not None:
                c = tl.where(w == 0.0, 0.0, w * norm)
            v = vector_numbers(index, m, m < terms, count, HAS_INDEX)
            values = values + (load(vectors + v * vector_stride, first, row, 0, high, c != 0.0, inner, groups, MODE, LARGE, V),)
            coefficients = coefficients + (c,)
        for j in tl.static_range(TERMS):
            c = coefficients[j][:, None]
            total = tl.where(c != 0.0, tl.fma(c, values[j], total), total)
            met = met | (coefficients[j] != 0.0)
    return total, met


@triton.jit(do_not_specialize=list(range(14)))
def lift_kernel(out, out_stride, basis, basis_stride, vectors, index, index_stride, weight, weight_stride, terms, batch, numel, inner, groups,
                OUT_MODE: tl.constexpr, BASIS_MODE: tl.constexpr, LARGE: tl.constexpr, QUADS: tl.constexpr, V: tl.constexpr,
                TERMS: tl.constexpr):
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
    zero = tl.full([QUADS, V], -0x80000000, tl.int32).to(tl.float32, bitcast=True)  # -0.0, as bits: see step.py
    total, _ = add_terms(zero, None, basis, basis_stride, vectors, at_index, weight + b * weight_stride, terms, first, row, high, inner, groups,
                         index is not None, BASIS_MODE, LARGE, V, TERMS)
    store(out + b * out_stride, first, row, 0, high, True, total, inner, groups, OUT_MODE, LARGE, V)


def lift_(out, basis, index, weight):
    """out (B, *shape) = sum_m weight basis[index]; basis: (V, *shape), weight: (B, M), index: (B, M) or None."""
    check_lift(out, basis, index, weight)
    if out.numel():
        programs, positional, options = arguments(out, basis, index, weight)
        run(lift_kernel, out.device, programs, *positional, **options)


def at_once(terms):
    """How many terms are loaded together, for so many terms."""
    return min(2 if interpreted() else TERMS, triton.next_power_of_2(max(terms, 1)))


def arguments(out, basis, index, weight):
    """What ``lift_kernel`` is launched with: (grid, positional arguments, options)."""
    g = geometry([out], others=[basis], axes=[1], noisy=False)
    terms = weight.shape[1]
    return g.grid, (
        out, stride(out), basis, stride(basis), len(basis), index, stride(index), weight, stride(weight), terms, g.batch, g.numel,
        g.inner, g.groups,
    ), dict(OUT_MODE=g.modes[0], BASIS_MODE=g.modes[1], LARGE=g.large, QUADS=g.quads, V=g.V, TERMS=at_once(terms),
            num_warps=g.num_warps)  # fmt: skip
