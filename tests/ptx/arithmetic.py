"""What PTX instructions compute, on NumPy arrays and scalars of the instruction's type. Bits as the PTX ISA defines them."""

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i32, i64, f16, f32, f64 = np.int32, np.int64, np.float16, np.float32, np.float64

NAN = u32(0x7FFFFFFF).view(f32)  # what float32 arithmetic gives for every NaN
NAN64 = u64(0x7FF8000000000000).view(f64)
_LOW = i64((1 << 28) - 1)


def canonical(x):
    """NaN of any kind becomes the one that the hardware gives."""
    return np.where(x != x, NAN if x.dtype == f32 else NAN64, x)[()]


def settled(x):
    d = np.vdot(x, x)
    return canonical(x) if d != d else x


def round_to_odd(product, addend):
    """The sum of two float64 rounded to odd: the neighbour with an odd last bit where the sum is not exact."""
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = np.atleast_1d(total).view(i64)
    error = np.atleast_1d(error)
    inexact = np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    toward = np.where((error > 0) == (np.atleast_1d(total) > 0), i64(1), i64(-1))
    return np.where(inexact, bits + toward, bits).view(f64).reshape(np.shape(total))[()]


def fma(a, b, c):
    """float32 a * b + c rounded once; the arguments are float64 arrays of float32 values.

    The product is exact in float64. Rounding the float64 sum again gives the right float32 unless that sum is a
    midpoint between two float32, subnormal ones included: then its low 28 bits are 0 and it is no float32. Only there
    the sum is made again, rounded to odd.
    """
    product = a * b
    total = product + c
    result = total.astype(f32)
    low = total.view(i64) & _LOW
    if np.count_nonzero(low) != low.size:
        doubtful = (low == 0) & (result != total)
        if doubtful.any():
            result = np.where(doubtful, round_to_odd(product, c).astype(f32), result)
            result = canonical(result)
    return result


def multiply_high(a, b):
    """The upper halves of products of uint64."""
    mask, half = u64(0xFFFFFFFF), u64(32)
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & mask)
    return a1 * b1 + (middle >> half) + (other >> half)


def multiply_high_signed(a, b):
    """The same of int64."""
    ua, ub = a.view(u64), b.view(u64)
    return (multiply_high(ua, ub) - np.where(a < 0, ub, u64(0)) - np.where(b < 0, ua, u64(0))).view(i64)


def quotient(a, b):
    """Towards zero. The caller has made sure that no divisor is 0."""
    if a.dtype.kind == "u":
        return a // b
    q = a // b
    return q + ((q * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


def remainder(a, b):
    return np.fmod(a, b)


def shift_left(a, by):
    """by is uint32 and may exceed the width: then nothing is left."""
    bits = 8 * a.dtype.itemsize
    return np.where(by >= bits, a.dtype.type(0), a << np.minimum(by, u32(bits - 1)).astype(a.dtype))[()]


def shift_right(a, by):
    bits = 8 * a.dtype.itemsize
    moved = a >> np.minimum(by, u32(bits - 1)).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(by >= bits, a.dtype.type(0), moved)[()]


def funnel(low, high, by, left, wrap):
    by = by & u32(31) if wrap else np.minimum(by, u32(32))
    pair = low.astype(u64) | high.astype(u64) << u64(32)
    by = by.astype(u64)
    return ((pair << by) >> u64(32) if left else pair >> by).astype(u32)


def permute(a, b, selector):
    pair = a.astype(u64) | b.astype(u64) << u64(32)
    out = u32(0)
    for i in range(4):
        pick = selector >> u32(4 * i) & u32(15)
        byte = (pair >> ((pick & u32(7)).astype(u64) * u64(8))).astype(u32) & u32(255)
        sign = np.where(byte & u32(128) != 0, u32(255), u32(0))
        out = out | np.where(pick & u32(8) != 0, sign, byte) << u32(8 * i)
    return out[()] if np.ndim(out) == 0 else out


def logic3(a, b, c, table):
    out = a ^ a
    for i in range(8):
        if table >> i & 1:
            out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return out


def field_mask(length, type_):
    """1 in the lowest ``length`` bits; length is uint32."""
    return shift_left(type_(1), length) - type_(1)


def field_extract(a, position, length):
    """bfe: of the width and the sign of a's type; bits above the top are copies of it, or 0 where unsigned."""
    bits, unsigned = 8 * a.dtype.itemsize, u32 if a.dtype.itemsize == 4 else u64
    position, length = position & u32(255), length & u32(255)
    raw = a.view(unsigned) if a.dtype.kind == "i" else a
    value = shift_right(raw, position) & field_mask(length, unsigned)
    if a.dtype.kind == "u":
        return value
    top = np.minimum(position + length - u32(1), u32(bits - 1))
    sign = (shift_right(raw, top) & unsigned(1)) * (length != 0).astype(unsigned)
    inside = np.where(position >= bits, u32(0), np.minimum(length, u32(bits) - np.minimum(position, u32(bits))))
    value = value | np.where(sign != 0, ~field_mask(inside, unsigned), unsigned(0))
    return np.where(length == 0, unsigned(0), value).view(a.dtype)[()]


def field_insert(a, b, position, length):
    """bfi: the lowest bits of a put into b."""
    position, length = position & u32(255), length & u32(255)
    mask = shift_left(field_mask(length, a.dtype.type), position)
    return b & ~mask | shift_left(a, position) & mask


def leading_bit(a):
    """Where the highest 1 stands, 0xFFFFFFFF where there is none. a: uint32 or uint64."""
    high = (a >> u64(32)).astype(f64) if a.dtype == u64 else None
    if high is None:
        return np.where(a == 0, u32(0xFFFFFFFF), (np.frexp(a.astype(f64))[1] - 1).astype(u32))[()]
    low = (a & u64(0xFFFFFFFF)).astype(f64)
    place = np.where(high > 0, np.frexp(high)[1] + 31, np.frexp(low)[1] - 1)
    return np.where(a == 0, u32(0xFFFFFFFF), place.astype(u32))[()]


def reverse_bits(a):
    if a.dtype == u64:
        high, low = (reverse_bits(half.astype(u32)).astype(u64) for half in (a >> u64(32), a & u64(0xFFFFFFFF)))
        return high | low << u64(32)
    for by, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        a = a >> u32(by) & u32(mask) | (a & u32(mask)) << u32(by)
    return a >> u32(16) | a << u32(16)


def count_bits(a):
    if a.dtype == u64:
        return count_bits((a >> u64(32)).astype(u32)) + count_bits((a & u64(0xFFFFFFFF)).astype(u32))
    a = a - (a >> u32(1) & u32(0x55555555))
    a = (a & u32(0x33333333)) + (a >> u32(2) & u32(0x33333333))
    return ((a + (a >> u32(4)) & u32(0x0F0F0F0F)) * u32(0x01010101)) >> u32(24)


def pick(p, a, b):
    if p.ndim == 0:
        return a if p else b
    return np.where(p, a, b)


# ------------------------------------------------------------------------------------------------ floats, 16-bit floats


def to_half(x):
    """float32 to the bits of float16, to nearest even."""
    return np.where(x != x, u16(0x7FFF), x.astype(f16).view(u16))[()]


def to_bfloat(x):
    bits = x.view(u32)
    out = (bits + u32(0x7FFF) + (bits >> u32(16) & u32(1))) >> u32(16)
    return np.where(x != x, u32(0x7FFF), out).astype(u16)[()]


def from_half(bits):
    return settled(bits.view(f16).astype(f32))


def from_bfloat(bits):
    return settled((bits.astype(u32) << u32(16)).view(f32))


def minimum(a, b, larger, nan):
    """min or max (larger) of floats: -0 < +0; a NaN is ignored, or (nan) kept."""
    low = np.where((a < b) | (a == b) & np.signbit(a), a, b)
    high = np.where((a > b) | (a == b) & ~np.signbit(a), a, b)
    out = high if larger else low
    if not nan:
        out = np.where(a != a, b, np.where(b != b, a, out))
    else:
        out = np.where((a != a) | (b != b), NAN if a.dtype == f32 else NAN64, out)
    return canonical(out)


_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_int(x, type_, rounding):
    """Clamped to the type's range; NaN is 0, or the top bit alone where either type has 64 bits."""
    info = np.iinfo(type_)
    value = _ROUNDING[rounding](x.astype(f64))
    low, high = f64(info.min), f64(info.max)  # the latter rounded up to 2^n where the type has 64 bits
    inside = np.where((value >= low) & (value < high), value, f64(0)).astype(type_)
    out = np.where(value >= high, type_(info.max), np.where(value <= low, type_(info.min), inside))
    wide = x.dtype == f64 or info.bits == 64
    nan = (u64(1) << u64(info.bits - 1)).astype(type_) if wide else type_(0)
    return np.where(x != x, nan, out).astype(type_)[()]


def round_float(x, rounding):
    return settled(_ROUNDING[rounding](x))
