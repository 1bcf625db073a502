"""``quantile_`` for Triton, by counting digits: ``fastdiff/reference/quantile.py`` says what it means.

Numbers that are not negative sort as their bits do. Each of four launches counts how often each value of the next 8 bits occurs
among the elements whose higher bits are those of the one sought, of two neighbours in rank at once; a fifth reads the two off. What
the launches before have found, every program works out again from their counts: nothing is waited for in between. Counts are
integers, so that the order in which programs add theirs does not matter. d is made anew from the inputs each time, and never stored.
A program is one warp.
"""

import torch
import triton
import triton.language as tl

from ..quantile_checks import check_quantile
from ..reference.quantile import position
from .launch import geometry, grid, run
from .project import stride
from .reduce import any_of, sum_of_two
from .step import _add, _scaled, _zeros
from .tile import load, narrow

__all__ = ["quantile_"]

PASSES, BINS = 4, 256  # 31 bits below the sign: 8, 8, 8 and 7
ROWS = 2 * PASSES + 1  # of counts of a sample: of both neighbours by pass, and one that is not 0 where there is NaN
TILE, TILES = 256, 8  # elements at once, and tiles of a program
_PASSES, _BINS, _ROWS = tl.constexpr(PASSES), tl.constexpr(BINS), tl.constexpr(ROWS)


@triton.jit
def _digit(counts, rank):
    """Which bin holds the element of that rank, and its rank within the bin."""
    n = tl.load(counts + tl.arange(0, _BINS))
    passed = tl.associative_scan(n, 0, sum_of_two) <= rank
    return tl.reduce(passed.to(tl.int32), 0, sum_of_two), rank - tl.reduce(tl.where(passed, n, 0), 0, sum_of_two)


@triton.jit
def _search(counts, below, above, PASS: tl.constexpr):
    """The bits that the passes before PASS have found of the elements ranked below and above. counts: pointer to the sample's."""
    prefix0 = tl.full([], 0, tl.int32)
    prefix1 = tl.full([], 0, tl.int32)
    rank0, rank1 = below.to(tl.int64), above.to(tl.int64)
    for p in tl.static_range(PASS):
        apart = (prefix0 != prefix1).to(tl.int32)
        digit0, rank0 = _digit(counts + 2 * p * _BINS, rank0)
        digit1, rank1 = _digit(counts + (2 * p + apart) * _BINS, rank1)
        width = 8 if p < _PASSES - 1 else 7
        prefix0 = prefix0 << width | digit0
        prefix1 = prefix1 << width | digit1
    return prefix0, prefix1


@triton.jit
def _flat(tile):
    return tl.reshape(tile, [tile.shape[0] * tile.shape[1]])


@triton.jit
def _count(digits, used, found, left_out):
    """Adds a tile: what is not used counts as a 0 that was left out. A mask of tl.histogram would not do: compiled by Triton 3.7, it
    may lie in the threads in another order than what it masks."""
    left_out += tl.reduce(tl.where(used, 0, 1), 1, sum_of_two)
    return found + tl.histogram(_flat(tl.where(used, digits, 0)), _BINS), left_out


@triton.jit
def _add_counts(counts, found, left_out):
    found = tl.where(tl.arange(0, _BINS) == 0, found - tl.reduce(left_out, 0, sum_of_two), found)
    tl.atomic_add(counts + tl.arange(0, _BINS), found.to(tl.int64), mask=found != 0, sem="relaxed")


@triton.jit(do_not_specialize=list(range(19)))
def count_kernel(
    counts, inputs, input_strides, coef, coef_stride, row, row_index, row_stride, rows, scale, scale_stride, scale_stride_slot,
    below, above, batch, numel, inner, groups, tiles,
    MODES: tl.constexpr, LARGE: tl.constexpr, QUADS: tl.constexpr, V: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Program (x, y, z): ``tiles`` tiles from x tiles on of sample y + z num_programs(1)."""
    b = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    if b >= batch:
        return
    counts += b * (_ROWS * _BINS)
    if row is None:
        r = row_index.to(tl.int64)
    else:
        r = tl.load(row + b * row_stride).to(tl.int64)
    coef += tl.minimum(tl.maximum(r, 0), rows - 1) * coef_stride
    weights = ()
    for k in tl.static_range(len(inputs)):
        factor = 1.0
        if scale is not None:
            factor = tl.load(scale + b * scale_stride + k * scale_stride_slot)
        weights = weights + (_scaled(coef + k, factor, scale is not None),)

    SHIFT: tl.constexpr = 23 - 8 * PASS if PASS < _PASSES - 1 else 0
    ABOVE: tl.constexpr = 31 - 8 * PASS
    MASK: tl.constexpr = 255 if PASS < _PASSES - 1 else 127
    prefix0, prefix1 = _search(counts, below, above, PASS)
    apart = prefix0 != prefix1
    found0 = tl.full([_BINS], 0, tl.int32)
    found1 = tl.full([_BINS], 0, tl.int32)
    at = tl.arange(0, QUADS) * V
    left_out0 = tl.full([QUADS], 0, tl.int32)
    left_out1 = tl.full([QUADS], 0, tl.int32)
    nan = tl.full([QUADS, V], False, tl.int1)
    for tile in range(tiles):
        first = (tl.program_id(0).to(tl.int64) * tiles + tile) * (QUADS * V)
        high = tl.minimum(numel - first, QUADS * V).to(tl.int32)
        d = _zeros(QUADS, V)
        for k in tl.static_range(len(inputs)):
            sample, used = inputs[k] + b * input_strides[k], weights[k] != 0.0
            d = _add(d, weights[k], load(sample, first, at, 0, high, used, inner, groups, MODES[k], LARGE, V))
        bits = d.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        there = at[:, None] + tl.arange(0, V)[None, :] < high
        digits = (bits >> SHIFT) & MASK
        if PASS == 0:
            found0, left_out0 = _count(digits, there, found0, left_out0)
            nan = nan | (there & (d != d))
        else:
            found0, left_out0 = _count(digits, there & ((bits >> ABOVE) == prefix0), found0, left_out0)
            if apart:
                found1, left_out1 = _count(digits, there & ((bits >> ABOVE) == prefix1), found1, left_out1)
    _add_counts(counts + 2 * PASS * _BINS, found0, left_out0)
    if PASS == 0:
        if any_of(_flat(nan)):
            tl.atomic_add(counts + (_ROWS - 1) * _BINS, 1, sem="relaxed")
    elif apart:
        _add_counts(counts + (2 * PASS + 1) * _BINS, found1, left_out1)


@triton.jit(do_not_specialize=list(range(11)))
def quantile_kernel(out, out_stride, clip, clip_stride, counts, below, above, weight, low, high, batch):
    """Program (x, y, z): sample y + z num_programs(1)."""
    b = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    if b >= batch:
        return
    counts += b * (_ROWS * _BINS)
    prefix0, prefix1 = _search(counts, below, above, _PASSES)
    one = tl.arange(0, 1)
    a = (prefix0 + one).to(tl.float32, bitcast=True)
    c = (prefix1 + one).to(tl.float32, bitcast=True)
    near = weight < 0.5
    value = tl.fma(tl.where(near, weight, weight - 1.0) + tl.full([1], 0.0, tl.float32), c - a, tl.where(near, a, c))
    nan = tl.load(counts + (_ROWS - 1) * _BINS + one) != 0
    bits = tl.where(nan, 0x7FC00000, narrow(value, tl.float32).to(tl.int32, bitcast=True))
    value = bits.to(tl.float32, bitcast=True)
    if out is not None:
        tl.store(out + b * out_stride + one, value)
    if clip is not None:
        t = tl.where(value < low, low, value)
        t = tl.where(t > high, high, t)
        clip += b * clip_stride
        tl.store(clip + one, narrow(-t, tl.float32))
        tl.store(clip + 1 + one, t)
        tl.store(clip + 2 + one, narrow(tl.div_rn(tl.full([1], 1.0, tl.float32), t), tl.float32))


def quantile_(out, clip, inputs, coef, row, row_index, scale, q, low, high):
    """out (B,) = the q-quantile of |sum_k coef[row, k] scale_k inputs_k|, clip (B, 3) = (-t, t, 1 / t) of it between low and
    high; either may be None. inputs: (B, *shape), coef: (N, K and more), row: a tensor () or (B,), or None for ``row_index``."""
    args = (out, clip, inputs, coef, row, row_index, scale, q, low, high)
    check_quantile(*args)
    if len(inputs[0]):
        counts = torch.zeros((len(inputs[0]), ROWS, BINS), dtype=torch.int64, device=coef.device)
        for kernel, (programs, positional, options) in launches(counts, *args):
            run(kernel, coef.device, programs, *positional, **options)


def launches(counts, out, clip, inputs, coef, row, row_index, scale, q, low, high):
    """What is launched: (kernel, (grid, positional arguments, options)) in order. counts: (B, ROWS, BINS) int64, all 0"""
    g = geometry(inputs, noisy=False)
    quads = min(g.quads, TILE // g.V)
    below, above, weight = position(g.numel, q)
    programs = grid(triton.cdiv(g.numel, quads * g.V * TILES), g.batch)
    arguments = (
        counts, tuple(inputs), tuple(map(stride, inputs)), coef, stride(coef), row, row_index, stride(row), len(coef),
        scale, stride(scale), stride(scale, 1), below, above, g.batch, g.numel, g.inner, g.groups, TILES,
    )  # fmt: skip
    for number in range(PASSES):
        options = dict(MODES=g.modes, LARGE=g.large, QUADS=quads, V=g.V, PASS=number, num_warps=1)
        yield count_kernel, (programs, arguments, options)
    arguments = out, stride(out), clip, stride(clip), counts, below, above, float(weight), low, high, g.batch
    yield quantile_kernel, (grid(1, g.batch), arguments, dict(num_warps=1))
