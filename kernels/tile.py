"""How a program reads and writes its part of a sample.

A program owns quads * V consecutive logical elements, V = 4 or 8, as a tile (quads, V). A thread holds whole rows of it:
the lanes of one Philox call are consecutive elements of one thread, and V of them make one access of 16 bytes (8 for
16-bit tensors beside 32-bit ones). So the tile's layout in registers is the same for loads, stores and noise, and no
value ever changes threads: no shared memory and no barrier.

Where a tensor cannot be read that way (not aligned, or not contiguous), its V lanes are accessed one by one and joined,
which keeps the layout.
"""

import triton
import triton.language as tl

# How a sample lies in memory: contiguous and aligned to whole rows of the tile, contiguous, channels-last.
WIDE, DENSE, CHANNELS_LAST = 0, 1, 2
_WIDE = tl.constexpr(WIDE)
_CHANNELS_LAST = tl.constexpr(CHANNELS_LAST)


@triton.jit
def join4(l0, l1, l2, l3):
    """Four (n,) tensors to (n, 4). Joins pair the outer bit of the lane first, so that the reshape moves nothing."""
    return tl.join(tl.join(l0, l2), tl.join(l1, l3)).reshape([l0.shape[0], 4])


@triton.jit
def join8(l0, l1, l2, l3, l4, l5, l6, l7):
    """Eight (n,) tensors to (n, 8)."""
    even = tl.join(tl.join(l0, l4), tl.join(l2, l6))
    odd = tl.join(tl.join(l1, l5), tl.join(l3, l7))
    return tl.join(even, odd).reshape([l0.shape[0], 8])


@triton.jit
def split(tile):
    """(n, V) to a tuple of V tensors (n,)."""
    n: tl.constexpr = tile.shape[0]
    if tile.shape[1] == 4:
        even, odd = tl.split(tile.reshape([n, 2, 2]))
        l0, l2 = tl.split(even)
        l1, l3 = tl.split(odd)
        return l0, l1, l2, l3
    else:
        even, odd = tl.split(tile.reshape([n, 2, 2, 2]))
        e0, e2 = tl.split(even)
        o1, o3 = tl.split(odd)
        l0, l4 = tl.split(e0)
        l2, l6 = tl.split(e2)
        l1, l5 = tl.split(o1)
        l3, l7 = tl.split(o3)
        return l0, l1, l2, l3, l4, l5, l6, l7


@triton.jit
def place(first, row, lane, inner, groups, MODE: tl.constexpr, LARGE: tl.constexpr):
    """Where logical element first + row + lane of a sample stands, relative to ``first`` unless channels-last."""
    if MODE == _CHANNELS_LAST:
        if LARGE:
            e = first + row + lane
            group = e // inner
            return (e - group * inner) * groups + group
        else:
            e = (first.to(tl.int32) + row + lane).to(tl.uint32)
            group = e // inner.to(tl.uint32)
            return ((e - group * inner.to(tl.uint32)) * groups.to(tl.uint32) + group).to(tl.int64)
    else:
        return row + lane


@triton.jit
def load(base, first, row, low, high, used, inner, groups, MODE: tl.constexpr, LARGE: tl.constexpr, V: tl.constexpr,
         WIDEN: tl.constexpr = True):
    """The tile (quads, V) of a sample, as float32 or (without WIDEN) as it is stored, its elements outside [low, high) and all of
    them without ``used`` undefined.

    base: pointer to the sample; first: int64, logical index of the program's first element; row: (quads,) int32,
    that of each row's first element relative to ``first``; low, high: int32, relative to ``first``.
    """
    if MODE == _WIDE:
        at = tl.multiple_of(base + first, V * (base.dtype.element_ty.primitive_bitwidth // 8))
        value = tl.load(at + (row[:, None] + tl.arange(0, V)[None, :]), mask=((row < high) & used)[:, None])
        return value.to(tl.float32) if WIDEN else value
    else:
        at = base
        if MODE != _CHANNELS_LAST:
            at = base + first
        lanes = ()
        for lane in tl.static_range(V):
            keep = (row + lane >= low) & (row + lane < high) & used
            value = tl.load(at + place(first, row, lane, inner, groups, MODE, LARGE), mask=keep)
            lanes = lanes + (value.to(tl.float32) if WIDEN else value,)
        if V == 4:
            return join4(lanes[0], lanes[1], lanes[2], lanes[3])
        else:
            return join8(lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6], lanes[7])


@triton.jit
def load_periodic(mask, offset, first, row, low, high, used, period, inner, groups, MODE: tl.constexpr,
                  WHOLE: tl.constexpr, LARGE: tl.constexpr, V: tl.constexpr):
    """Like ``load``, of a mask whose element e mod period belongs to element e of the sample. offset: int64, of the sample's mask;
    WHOLE: period is the size of the sample."""
    if WHOLE:
        return load(mask + offset, first, row, low, high, used, inner, groups, MODE, LARGE, V)
    else:
        if LARGE:
            start = (first % period) + row
        else:
            start = (first % period).to(tl.uint32) + row.to(tl.uint32)
            period = period.to(tl.uint32)
        if MODE == _WIDE:
            at = tl.multiple_of(start % period, V).to(tl.int64)
            base = tl.multiple_of(mask + offset, V * (mask.dtype.element_ty.primitive_bitwidth // 8))
            keep = ((row < high) & used)[:, None]
            return tl.load(base + (at[:, None] + tl.arange(0, V)[None, :]), mask=keep).to(tl.float32)
        else:
            lanes = ()
            for lane in tl.static_range(V):
                keep = (row + lane >= low) & (row + lane < high) & used
                lanes = lanes + (tl.load(mask + offset + ((start + lane) % period).to(tl.int64), mask=keep).to(tl.float32),)
            if V == 4:
                return join4(lanes[0], lanes[1], lanes[2], lanes[3])
            else:
                return join8(lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6], lanes[7])


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even; NaN becomes the canonical quiet NaN, chosen as bits since a GPU's own
    NaN is another one."""
    if dtype == tl.float32:
        bits = tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))
    elif dtype == tl.float16:
        bits = tl.where(value != value, 0x7E00, value.to(tl.float16).to(tl.int16, bitcast=True)).to(tl.int16)
    else:
        bits = tl.where(value != value, 0x7FC0, value.to(tl.bfloat16).to(tl.int16, bitcast=True)).to(tl.int16)
    return bits.to(dtype, bitcast=True)


@triton.jit
def store(base, first, row, low, high, used, value, inner, groups, MODE: tl.constexpr, LARGE: tl.constexpr,
          V: tl.constexpr, NARROW: tl.constexpr = True):
    """The inverse of ``load``: rounds the tile once (unless NARROW is off) and writes its elements in [low, high) if ``used``."""
    stored = narrow(value, base.dtype.element_ty) if NARROW else value
    if MODE == _WIDE:
        at = tl.multiple_of(base + first, V * (base.dtype.element_ty.primitive_bitwidth // 8))
        tl.store(at + (row[:, None] + tl.arange(0, V)[None, :]), stored, mask=((row < high) & used)[:, None])
    else:
        at = base
        if MODE != _CHANNELS_LAST:
            at = base + first
        lanes = split(stored)
        for lane in tl.static_range(V):
            keep = (row + lane >= low) & (row + lane < high) & used
            tl.store(at + place(first, row, lane, inner, groups, MODE, LARGE), lanes[lane], mask=keep)
