"""The fixed tree for Triton: ``fastdiff/reference/reduce.py`` says what it is.

The 256 lanes stand along the last dimension of a tensor, several vectors along the first. The order in which ``tl.reduce`` adds is
nowhere promised, so that each level of the pairwise sums is a reduction of its own, over an axis of two: there is one order.
"""

import triton
import triton.language as tl

from .tile import CHANNELS_LAST, WIDE, place

CHUNK, LANES = 2048, 256
_CHUNK, _LANES = tl.constexpr(CHUNK), tl.constexpr(LANES)
_WIDE, _CHANNELS_LAST = tl.constexpr(WIDE), tl.constexpr(CHANNELS_LAST)


@triton.jit
def sum_of_two(a, b):
    return a + b


@triton.jit
def pairwise(lanes):
    """(rows, lanes) to (rows,): the upper half is added to the lower one until one lane is left."""
    rows: tl.constexpr = lanes.shape[0]
    half: tl.constexpr = lanes.shape[1] // 2
    if half == 0:
        return lanes.reshape([rows])
    else:
        return pairwise(tl.reduce(lanes.reshape([rows, 2, half]), 1, sum_of_two))


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def any_of(conditions):
    """1 where any of the conditions (n,) holds, else 0."""
    return tl.reduce(conditions.to(tl.int32), 0, _either)


@triton.jit
def load_lanes(base, first, numel, used, inner, groups, MODE: tl.constexpr, LARGE: tl.constexpr, V: tl.constexpr):
    """Elements first .. first + 255 of samples that begin at pointers base (rows,), as float32 (rows, 256); 0.0 where a sample has no
    element or is not ``used`` (rows,). first: int64."""
    lane = tl.arange(0, _LANES)
    high = numel - first
    if MODE == _CHANNELS_LAST:
        at = base[:, None] + place(first, lane, 0, inner, groups, MODE, LARGE)[None, :]
    else:
        start = base + first
        if MODE == _WIDE:  # said of results of operations: of arguments it would be forgotten
            start = tl.multiple_of(start, V * (base.dtype.element_ty.primitive_bitwidth // 8))
            high = tl.multiple_of(high, V)
        at = start[:, None] + lane[None, :]
    return tl.load(at, mask=used[:, None] & (lane < high)[None, :], other=0.0).to(tl.float32)


@triton.jit
def second_level(sums, chunks):
    """The sum of a sample from those of its chunks, as (1,). sums: pointer to the first of them."""
    lane = tl.arange(0, _LANES)
    total = tl.full([1, _LANES], 0.0, tl.float32)
    for c in range(0, chunks, _LANES):
        total += tl.load(sums + c + lane, mask=c + lane < chunks, other=0.0)[None, :]
    return pairwise(total)
