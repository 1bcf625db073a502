"""Floating-point instructions against libm, NumPy, exact fractions and every 16-bit number."""

import ctypes
import ctypes.util
from fractions import Fraction

import numpy as np
import pytest

from ptx import PtxError
from ptx.snippets import elementwise

f32, f64, u16, u32, u64 = np.float32, np.float64, np.uint16, np.uint32, np.uint64
NAN = 0x7FFFFFFF
SPECIAL = np.array([0, 1, 2, 3, 0x007FFFFF, 0x00800000, 0x00800001, 0x00FFFFFF, 0x01000000, 0x33000000, 0x34000000, 0x3F7FFFFF, 0x3F800000,
                    0x3F800001, 0x40000000, 0x4B000000, 0x4B7FFFFF, 0x4B800000, 0x5F000000, 0x7F000000, 0x7F7FFFFE, 0x7F7FFFFF, 0x7F800000,
                    0x7F800001, 0x7FC00000, 0x3EAAAAAB, 0x1F800000, 0x20000000, 0x2B8CBCCC], u32)
SPECIAL = np.concatenate([SPECIAL, SPECIAL | u32(0x80000000)])


def same(bits, expected):
    """Bits agree, NaN being the canonical one."""
    expected = np.asarray(expected, f32)
    wanted = np.where(np.isnan(expected), u32(NAN), expected.view(u32))
    bad = np.flatnonzero(bits != wanted)
    assert bad.size == 0, [(hex(bits[k]), hex(wanted[k])) for k in bad[:5]]


def pairs():
    data = np.random.default_rng(0)
    a, b = (x.ravel() for x in np.meshgrid(SPECIAL, SPECIAL))
    more = data.integers(0, 2**32, (2, 60000), dtype=u32)
    return np.concatenate([a, more[0]]).view(f32), np.concatenate([b, more[1]]).view(f32)


def triples():
    """Special values in all combinations, any bits, sums that cancel, results in the subnormal range, midpoints."""
    data = np.random.default_rng(1)
    few = SPECIAL[::2]
    rows = [np.stack([x.ravel() for x in np.meshgrid(few, few, few)]), data.integers(0, 2**32, (3, 60000), dtype=u32)]
    a, b = data.standard_normal((2, 40000)).astype(f32)
    with np.errstate(all="ignore"):
        near = -(a * b)
        near = (near.view(np.int32) + data.integers(-2, 3, near.shape, dtype=np.int32)).view(f32)
        rows.append(np.stack([a, b, near]).view(u32))
        small = (a * f32(2.0) ** -70).astype(f32), (b * f32(2.0) ** data.integers(-80, -60, b.shape)).astype(f32)
        rows.append(np.stack([*small, data.integers(0, 64, a.shape).astype(u32).view(f32)]).view(u32))
        # A product of exactly half an ulp of the addend, give or take what a third factor adds.
        whole = (1 + data.integers(0, 2**23, a.shape) * 2.0**-23).astype(f32)
        half = np.full_like(whole, 2.0**-12) + data.choice([0, 2.0**-35, -(2.0**-36)], a.shape).astype(f32)
        rows.append(np.stack([half, np.full_like(whole, 2.0**-12) * data.choice([1, -1], a.shape).astype(f32), whole]).view(u32))
    return [r.view(f32) for r in np.concatenate(rows, axis=1)]


def libm_fmaf(a, b, c):
    function = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    return np.array([function(x, y, z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())], f32)


def test_fma_is_libm():
    a, b, c = triples()
    expected = libm_fmaf(a, b, c)
    same(elementwise("fma.rn.f32 %d0, %a0, %a1, %a2;", [a, b, c], [u32])[0], expected)
    same(elementwise("mad.rn.f32 %d0, %a0, %a1, %a2;", [a, b, c], [u32])[0], expected)
    half = len(a) // 2
    wide = [np.ascontiguousarray(x[:2 * half].reshape(-1, 2)).view(u64).ravel() for x in (a, b, c)]
    (pairs,) = elementwise("fma.rn.f32x2 %d0, %a0, %a1, %a2;", wide, [u64])
    same(pairs.view(u32), expected[:2 * half])


def test_fma_of_one_thread_and_of_constants():
    """What all threads share is computed once: the same bits."""
    a, b, c = (x[::997][:300] for x in triples())
    expected = libm_fmaf(a, b, c)
    for x, y, z, e in zip(a, b, c, expected):
        code = " ".join(f"mov.b32 %r{k}, 0f{v.view(u32):08X};" for k, v in enumerate((x, y, z)))
        same(elementwise(code + "fma.rn.f32 %d0, %r0, %r1, %r2;", [np.zeros(3, u32)], [u32])[0], [e] * 3)


def test_arithmetic():
    a, b = pairs()
    with np.errstate(all="ignore"):
        for name, expected in {"add.rn": a + b, "sub.rn": a - b, "mul.rn": a * b, "div.rn": a / b}.items():
            same(elementwise(f"{name}.f32 %d0, %a0, %a1;", [a, b], [u32])[0], expected)
        same(elementwise("sqrt.rn.f32 %d0, %a0;", [a], [u32])[0], np.sqrt(a))
        same(elementwise("rcp.rn.f32 %d0, %a0;", [a], [u32])[0], f32(1) / a)
        wide = [np.ascontiguousarray(x[:len(x) // 2 * 2].reshape(-1, 2)).view(u64).ravel() for x in (a, b)]
        for name, expected in {"add": a + b, "sub": a - b, "mul": a * b}.items():
            (out,) = elementwise(f"{name}.rn.f32x2 %d0, %a0, %a1;", wide, [u64])
            same(out.view(u32), expected[:2 * len(out)])
    (neg,) = elementwise("neg.f32 %d0, %a0;", [a], [u32])
    (abs_,) = elementwise("abs.f32 %d0, %a0;", [a], [u32])
    assert (neg == a.view(u32) ^ u32(1 << 31)).all() and (abs_ == a.view(u32) & u32(NAN)).all()


def rounded(value):
    """A positive fraction as float32, to nearest even, from the definition."""
    if value == 0:
        return f32(0)
    exponent = value.numerator.bit_length() - value.denominator.bit_length() - 1
    while Fraction(2) ** (exponent + 1) <= value:
        exponent += 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    return f32(float(round(value / ulp) * ulp))  # Python rounds fractions to even; the result is a float32 already


def test_division_and_root_from_the_definition():
    data = np.random.default_rng(2)
    a, b = (x.view(f32) for x in data.integers(0x1000, 0x7F800000, (2, 3000), dtype=u32))
    quotients = [Fraction(float(x)) / Fraction(float(y)) for x, y in zip(a, b)]
    inside = np.array([q < Fraction(2) ** 127 for q in quotients])
    same(elementwise("div.rn.f32 %d0, %a0, %a1;", [a[inside], b[inside]], [u32])[0], [rounded(q) for q, k in zip(quotients, inside) if k])
    (root,) = elementwise("sqrt.rn.f32 %d0, %a0;", [a], [u32])
    low, high = (np.array([float(v) for v in (root.view(np.int32) + k).view(f32)]) for k in (-1, 1))
    middle = root.view(f32).astype(f64)
    for x, r, l, h in zip(a, middle, low, high):  # the root lies between the midpoints to both neighbours
        x = Fraction(float(x))
        assert ((Fraction(float(r)) + Fraction(float(l))) / 2) ** 2 <= x <= ((Fraction(float(r)) + Fraction(float(h))) / 2) ** 2


def test_minimum_and_maximum():
    a, b = pairs()
    for name, function in {"min": np.fmin, "max": np.fmax}.items():
        expected = function(a, b)
        zeros = (a == 0) & (b == 0)
        sign = np.signbit(a) | np.signbit(b) if name == "min" else np.signbit(a) & np.signbit(b)
        expected = np.where(zeros, np.where(sign, f32(-0.0), f32(0)), expected)
        same(elementwise(f"{name}.f32 %d0, %a0, %a1;", [a, b], [u32])[0], expected)
        nan = np.isnan(a) | np.isnan(b)
        same(elementwise(f"{name}.NaN.f32 %d0, %a0, %a1;", [a, b], [u32])[0], np.where(nan, f32("nan"), expected))


def test_comparisons():
    a, b = pairs()
    nan = np.isnan(a) | np.isnan(b)
    ordered = {"eq": a == b, "ne": (a != b) & ~nan, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "num": ~nan, "nan": nan}
    expected = ordered | {f"{k}u": ordered[k] | nan for k in ("eq", "ne", "lt", "le", "gt", "ge")}
    for name, wanted in expected.items():
        (got,) = elementwise(f"setp.{name}.f32 %p0, %a0, %a1;", [a, b], [bool])
        assert (got == wanted).all(), name
        (got, other) = elementwise(f"setp.lt.f32 %p9, %a0, 0f00000000; setp.{name}.and.f32 %p0|%p1, %a0, %a1, %p9;", [a, b], [bool, bool])
        assert (got == wanted & (a < 0)).all() and (other == ~wanted & (a < 0)).all(), name


def test_every_half_is_widened():
    bits = np.arange(65536, dtype=np.uint32).astype(u16)
    same(elementwise("cvt.f32.f16 %d0, %a0;", [bits], [u32])[0], bits.view(np.float16).astype(f32))
    expected = (bits.astype(u32) << u32(16)).view(f32)
    same(elementwise("cvt.f32.bf16 %d0, %a0;", [bits], [u32])[0], expected)


def neighbours(kind):
    """Between any two finite neighbours a float32 just below their midpoint, the midpoint and one just above, and what each becomes."""
    bits = np.arange(0, (0x7C00 if kind == "f16" else 0x7F80) + 1, dtype=u32)
    if kind == "f16":
        values = bits.astype(u16).view(np.float16).astype(f64)
        values[-1] = 65536.0  # where infinity begins
    else:
        values = (bits << u32(16)).view(f32).astype(f64)
        values[-1] = 2.0**128
    middle = ((values[:-1] + values[1:]) / 2).astype(f32)
    below, above = (middle.view(np.int32) - 1).view(f32), (middle.view(np.int32) + 1).view(f32)
    low, high = bits[:-1], bits[1:]
    even = np.where(low % 2 == 0, low, high)
    x = np.concatenate([below, middle, above, values[:-1].astype(f32)])
    out = np.concatenate([low, even, high, low])
    return np.concatenate([x, -x]), np.concatenate([out, out | 0x8000]).astype(u16)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_every_boundary_between_16_bit_numbers(kind):
    x, expected = neighbours(kind)
    specials = np.array([np.inf, -np.inf, np.nan, -np.nan, 3.4e38, -3.4e38, 1e-45, -1e-45], f32)
    big = 0x7C00 if kind == "f16" else 0x7F80
    more = [big, big | 0x8000, 0x7FFF, 0x7FFF, big, big | 0x8000, 0, 0x8000]  # 3.4e38 is beyond the largest of both
    x, expected = np.concatenate([x, specials]), np.concatenate([expected, np.array(more, u16)])
    (out,) = elementwise(f"cvt.rn.{kind}.f32 %d0, %a0;", [x], [u16])
    assert (out == expected).all(), (x[out != expected][:5], out[out != expected][:5])
    other = np.roll(x, 7)
    (out,) = elementwise(f"cvt.rn.{kind}x2.f32 %d0, %a0, %a1;", [other, x], [u32])
    assert (out == (np.roll(expected, 7).astype(u32) << u32(16) | expected)).all()  # the first operand is the upper half


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64", "u16", "s16"])
def test_integers_to_float(t):
    bits = int(t[1:])
    data = np.random.default_rng(3)
    values = [0, 1, 2**24, 2**24 + 1, 2**24 + 3, 2**25 + 2, 2**25 + 6, 2**31 - 1, 2**31, 2**31 + 128, 2**32 - 1, 2**40 + 2**16, 2**63, 2**64 - 1]
    values += [2**e + d for e in range(24, 64) for k in (e - 24,) for d in (2**k - 1, 2**k, 2**k + 1, 3 * 2**k)]
    values += [int(v) for v in data.integers(0, 2**63, 2000)] + [int(v) >> 31 for v in data.integers(0, 2**63, 2000)]
    values = [v & (1 << bits) - 1 for v in values]
    signed = [v - (1 << bits) if t[0] == "s" and v >> bits - 1 else v for v in values]
    expected = np.array([-rounded(Fraction(-v)) if v < 0 else rounded(Fraction(v)) for v in signed], f32)
    same(elementwise(f"cvt.rn.f32.{t} %d0, %a0;", [np.array(values, f"u{bits // 8}")], [u32])[0], expected)


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64", "u16", "s16"])
@pytest.mark.parametrize("rounding, function", [("rni", round), ("rzi", int), ("rmi", np.floor), ("rpi", np.ceil)])
def test_float_to_integers(t, rounding, function):
    bits, data = int(t[1:]), np.random.default_rng(4)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if t[0] == "s" else (0, (1 << bits) - 1)
    x = np.concatenate([SPECIAL.view(f32), data.standard_normal(500).astype(f32) * f32(2.0) ** data.integers(-3, 66, 500).astype(f32),
                        np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2**31, 2**32, 2**63, -(2**31), -(2**63), 65535.5, -32768.5], f32)]).astype(f32)

    def one(v):
        if np.isnan(v):
            return 1 << bits - 1 if bits == 64 else 0
        return low if v == -np.inf else high if v == np.inf else min(max(int(function(float(v))), low), high)

    (out,) = elementwise(f"cvt.{rounding}.{t}.f32 %d0, %a0;", [x], [f"u{bits // 8}"])
    assert [int(v) for v in out] == [one(v) & (1 << bits) - 1 for v in x]


def test_doubles():
    data = np.random.default_rng(5)
    a, b = (x.view(f64) for x in data.integers(0, 2**64, (2, 5000), dtype=u64))
    with np.errstate(all="ignore"):
        a, b = (np.concatenate([x, y[:3000].astype(f64)]) for x, y in zip((a, b), pairs()))
        for name, expected in {"add.rn": a + b, "sub.rn": a - b, "mul.rn": a * b, "div.rn": a / b}.items():
            out = elementwise(f"{name}.f64 %d0, %a0, %a1;", [a, b], [u64])[0].view(f64)
            assert np.array_equal(out, expected, equal_nan=True)
        same(elementwise("cvt.rn.f32.f64 %d0, %a0;", [a], [u32])[0], a.astype(f32))
        single = pairs()[0]
        assert np.array_equal(elementwise("cvt.f64.f32 %d0, %a0;", [single], [u64])[0].view(f64), single.astype(f64), equal_nan=True)


@pytest.mark.parametrize("code", ["add.f32 %d0, %a0, %a0;", "mul.f32 %d0, %a0, %a0;", "add.rz.f32 %d0, %a0, %a0;", "add.rn.ftz.f32 %d0, %a0, %a0;",
                                  "fma.rn.sat.f32 %d0, %a0, %a0, %a0;", "fma.rz.f32 %d0, %a0, %a0, %a0;", "div.full.f32 %d0, %a0, %a0;",
                                  "div.approx.f32 %d0, %a0, %a0;", "sqrt.approx.f32 %d0, %a0;", "sqrt.approx.ftz.f32 %d0, %a0;",
                                  "rsqrt.approx.f32 %d0, %a0;", "ex2.approx.f32 %d0, %a0;", "cvt.rz.f16.f32 %h0, %a0;", "cvt.f16.f32 %h0, %a0;",
                                  "cvt.rn.satfinite.bf16.f32 %h0, %a0;", "cvt.rna.tf32.f32 %d0, %a0;", "setp.lt.ftz.f32 %p0, %a0, %a0;",
                                  "fma.rn.f64 %rd0, %rd0, %rd0, %rd0;", "add.rn.f16 %h0, %h0, %h0;"])
def test_what_is_not_exact_is_refused(code):
    with pytest.raises(PtxError, match=code.split()[0]):
        elementwise(code, [np.zeros(4, f32)], [u32])
