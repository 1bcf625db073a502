"""Each instruction on integers and predicates against Python's integers."""

import itertools

import numpy as np
import pytest

from ptx.snippets import elementwise

EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 0xDEADBEEF01234567]


def wrap(value, bits, signed):
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> bits - 1 else value


def operands(type_, count, seed=0):
    """Edges against edges, then random bits, of random lengths."""
    bits, data = int(type_[1:]), np.random.default_rng(seed)
    edges = [e & (1 << bits) - 1 for e in EDGES]
    rows = list(itertools.product(edges, repeat=count)) if count <= 2 else [tuple(edges[i] for i in data.integers(len(edges), size=count)) for _ in range(400)]
    rows = [list(row) for row in rows]
    for _ in range(300):
        rows.append([int(data.integers(0, 2**63)) * 2 + 1 >> int(data.integers(0, bits)) & (1 << bits) - 1 for _ in range(count)])
    return [np.array(column, f"u{bits // 8}") for column in zip(*rows)]


def check(code, types, out, function, seed=0, arrays=None):
    """The instruction on operands of these types; function takes and returns Python integers."""
    arrays = arrays or operands(types[0], len(types), seed)
    arrays = [a.astype(f"u{int(t[1:]) // 8}") for a, t in zip(arrays, types)]
    (result,) = elementwise(code, arrays, [bool if out == "pred" else f"u{int(out[1:]) // 8}"])
    for k, row in enumerate(zip(*arrays)):
        values = [wrap(int(v), int(t[1:]), t[0] == "s") for v, t in zip(row, types)]
        expected = function(*values)
        expected = bool(expected) if out == "pred" else wrap(expected, int(out[1:]), False)
        assert int(result[k]) == expected, (code, values, int(result[k]), expected)


def divide(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


TYPES = ("u16", "s16", "u32", "s32", "u64", "s64")


@pytest.mark.parametrize("t", TYPES)
def test_arithmetic(t):
    bits = int(t[1:])
    check(f"add.{t} %d0, %a0, %a1;", [t, t], t, lambda a, b: a + b)
    check(f"sub.{t} %d0, %a0, %a1;", [t, t], t, lambda a, b: a - b)
    check(f"mul.lo.{t} %d0, %a0, %a1;", [t, t], t, lambda a, b: a * b)
    check(f"mul.hi.{t} %d0, %a0, %a1;", [t, t], t, lambda a, b: a * b >> bits)
    check(f"mad.lo.{t} %d0, %a0, %a1, %a2;", [t, t, t], t, lambda a, b, c: a * b + c)
    check(f"mad.hi.{t} %d0, %a0, %a1, %a2;", [t, t, t], t, lambda a, b, c: (a * b >> bits) + c)
    check(f"min.{t} %d0, %a0, %a1;", [t, t], t, min)
    check(f"max.{t} %d0, %a0, %a1;", [t, t], t, max)
    if bits < 64:
        wide = f"{t[0]}{2 * bits}"
        check(f"mul.wide.{t} %d0, %a0, %a1;", [t, t], wide, lambda a, b: a * b)
        check(f"mad.wide.{t} %d0, %a0, %a1, 77;", [t, t], wide, lambda a, b: a * b + 77)
    nonzero = [a[operands(t, 2)[1] != 0] for a in operands(t, 2)]
    if t[0] == "s":  # the smallest number by -1 does not fit
        fits = ~((nonzero[0] == 1 << bits - 1) & (nonzero[1] == (1 << bits) - 1))
        nonzero = [a[fits] for a in nonzero]
        check(f"neg.{t} %d0, %a0;", [t], t, lambda a: -a)
        check(f"abs.{t} %d0, %a0;", [t], t, abs)
    check(f"div.{t} %d0, %a0, %a1;", [t, t], t, divide, arrays=nonzero)
    check(f"rem.{t} %d0, %a0, %a1;", [t, t], t, lambda a, b: a - b * divide(a, b), arrays=nonzero)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts(bits):
    b, u, s, n = f"b{bits}", f"u{bits}", f"s{bits}", "u32"
    check(f"and.{b} %d0, %a0, %a1;", [u, u], u, lambda x, y: x & y)
    check(f"or.{b} %d0, %a0, %a1;", [u, u], u, lambda x, y: x | y)
    check(f"xor.{b} %d0, %a0, %a1;", [u, u], u, lambda x, y: x ^ y)
    check(f"not.{b} %d0, %a0;", [u], u, lambda x: ~x)
    amounts = [np.repeat(operands(u, 1)[0], 9), np.tile(np.array([0, 1, bits - 1, bits, bits + 1, 63, 64, 2**31, 2**32 - 1], np.uint32), len(operands(u, 1)[0]))]
    check(f"shl.{b} %d0, %a0, %a1;", [u, n], u, lambda x, y: x << y if y < bits else 0, arrays=amounts)
    check(f"shr.{u} %d0, %a0, %a1;", [u, n], u, lambda x, y: x >> min(y, bits), arrays=amounts)
    check(f"shr.{b} %d0, %a0, %a1;", [u, n], u, lambda x, y: x >> min(y, bits), arrays=amounts)
    check(f"shr.{s} %d0, %a0, %a1;", [s, n], s, lambda x, y: x >> min(y, bits), arrays=amounts)
    for k in (0, 1, bits - 1, bits, 200):
        check(f"shl.{b} %d0, %a0, {k};", [u], u, lambda x: x << k)
        check(f"shr.{s} %d0, %a0, {k};", [s], s, lambda x: x >> k)
        check(f"shr.{u} %d0, %a0, {k};", [u], u, lambda x: x >> k)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(bits):
    b, u, s = f"b{bits}", f"u{bits}", f"s{bits}"
    data = np.random.default_rng(1)
    values, others = operands(u, 2)
    places = data.choice([0, 1, 5, 31, 32, 33, 63, 64, 70, 255, 256 + 3], (2, len(values))).astype(np.uint32)

    def extract(x, position, length, signed):
        position, length = position & 255, length & 255
        top = min(position + length - 1, bits - 1)
        sign = 1 if signed and length and x >> top & 1 else 0
        return sum((x >> position + i & 1 if i < length and position + i < bits else sign) << i for i in range(bits))

    check(f"bfe.{u} %d0, %a0, %a1, %a2;", [u, "u32", "u32"], u, lambda x, p, n: extract(x, p, n, False), arrays=[values, *places])
    check(f"bfe.{s} %d0, %a0, %a1, %a2;", [u, "u32", "u32"], u, lambda x, p, n: extract(x, p, n, True), arrays=[values, *places])

    def insert(x, y, position, length):
        position, length = position & 255, length & 255
        for i in range(length):
            if position + i < bits:
                y = y & ~(1 << position + i) | (x >> i & 1 if i < bits else 0) << position + i
        return y

    check(f"bfi.{b} %d0, %a0, %a1, %a2, %a3;", [u, u, "u32", "u32"], u, insert, arrays=[values, others, *places])
    check(f"bfi.{b} %d0, %a0, %a1, 32, 32;", [u, u], u, lambda x, y: insert(x, y, 32, 32))
    check(f"brev.{b} %d0, %a0;", [u], u, lambda x: int(f"{x:0{bits}b}"[::-1], 2))
    check(f"popc.{b} %d0, %a0;", [u], "u32", lambda x: bin(x).count("1"))
    check(f"clz.{b} %d0, %a0;", [u], "u32", lambda x: bits - x.bit_length())
    check(f"bfind.{u} %d0, %a0;", [u], "u32", lambda x: x.bit_length() - 1)
    check(f"bfind.shiftamt.{u} %d0, %a0;", [u], "u32", lambda x: bits - x.bit_length() if x else -1)


def test_words():
    def permute(x, y, selector):
        pair, out = (x | y << 32).to_bytes(8, "little"), 0
        for i in range(4):
            pick = selector >> 4 * i & 15
            byte = pair[pick & 7]
            out |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
        return out

    check("prmt.b32 %d0, %a0, %a1, %a2;", ["u32"] * 3, "u32", permute)
    check("prmt.b32 %d0, %a0, %a1, 4180;", ["u32"] * 2, "u32", lambda x, y: permute(x, y, 4180))
    for mode in ("wrap", "clamp"):
        amount = (lambda n: n & 31) if mode == "wrap" else (lambda n: min(n, 32))  # noqa: E731
        check(f"shf.l.{mode}.b32 %d0, %a0, %a1, %a2;", ["u32"] * 3, "u32", lambda x, y, n: (x | y << 32) << amount(n) >> 32)
        check(f"shf.r.{mode}.b32 %d0, %a0, %a1, %a2;", ["u32"] * 3, "u32", lambda x, y, n: (x | y << 32) >> amount(n))
    for table in (0x96, 0xE8, 0xCA, 0x01, 0xFE, 0x40):
        check(f"lop3.b32 %d0, %a0, %a1, %a2, {table};", ["u32"] * 3, "u32",
              lambda x, y, z: sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1) & 1) << i for i in range(32)))


@pytest.mark.parametrize("t", [*TYPES, "b16", "b32", "b64"])
def test_comparisons(t):
    signed = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b}
    if t[0] != "b":
        signed |= {"lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}
    if t[0] == "u":
        signed |= {"lo": signed["lt"], "ls": signed["le"], "hi": signed["gt"], "hs": signed["ge"]}
    like = t.replace("b", "u")
    for name, function in signed.items():
        check(f"setp.{name}.{t} %p0, %a0, %a1;", [like, like], "pred", function)
    check(f"setp.ne.{t} %p9, %a0, 0; setp.eq.or.{t} %p0|%p1, %a0, %a1, !%p9; @%p1 not.pred %p0, %p0;", [like, like], "pred",
          lambda a, b: not (a == b or a == 0) if (a != b or a == 0) else (a == b or a == 0))
    check(f"setp.ne.{t} %p9, %a0, 0; selp.{t} %d0, %a0, %a1, %p9;", [like, like], like, lambda a, b: a or b)


def test_predicates():
    check("setp.ne.u32 %p1, %a0, 0; setp.ne.u32 %p2, %a1, 0; and.pred %p3, %p1, %p2; or.pred %p4, %p1, %p2; xor.pred %p5, %p3, %p4;"
          "mov.pred %p6, -1; mov.pred %p7, 0; not.pred %p8, %p5; mov.pred %p9, %p8; and.pred %p10, %p6, %p9; or.pred %p0, %p7, %p10;",
          ["u32", "u32"], "pred", lambda a, b: (a != 0) == (b != 0))
    check("setp.lt.s32 %p3, %a1, 9; setp.gt.and.s32 %p1|%p2, %a0, 5, %p3;"
          "selp.b32 %d0, 1, 0, %p1; @%p2 add.s32 %d0, %d0, 2;", ["s32", "s32"], "u32",
          lambda a, b: (a > 5 and b < 9) + 2 * (not a > 5 and b < 9))
    check("mov.b32 %d0, 0; setp.eq.u32 %p1, %a0, 1; @%p1 mov.b32 %d0, 5; @!%p1 mov.b32 %d0, %a1;", ["u32", "u32"], "u32",
          lambda a, b: 5 if a == 1 else b)
    check("slct.b32.s32 %d0, %a0, %a1, %a2;", ["u32", "u32", "s32"], "u32", lambda a, b, c: a if c >= 0 else b)


@pytest.mark.parametrize("to", ["u8", "s8", *TYPES])
@pytest.mark.parametrize("from_", ["u8", "s8", *TYPES])
def test_conversions_of_integers(to, from_):
    wide = {"u8": "u16", "s8": "u16"}.get(from_, from_.replace("s", "u"))
    out = {"u8": "u16", "s8": "s16"}.get(to, to)
    check(f"cvt.{to}.{from_} %d0, %a0;", [wide], out, lambda a: wrap(wrap(a, int(from_[1:]), from_[0] == "s"), int(to[1:]), to[0] == "s"))


def test_moves():
    check("mov.b64 {%r1, %r2}, %a0; mov.b64 %d0, {%r2, %r1};", ["u64"], "u64", lambda a: (a >> 32) | a << 32)
    check("mov.b64 {%h1, %h2, %h3, %h4}, %a0; mov.b64 %d0, {%h4, %h3, %h2, %h1};", ["u64"], "u64",
          lambda a: sum((a >> 16 * k & 0xFFFF) << 48 - 16 * k for k in range(4)))
    check("mov.b32 {%h1, %h2}, %a0; mov.b32 %d0, {%h2, %h1};", ["u32"], "u32", lambda a: a >> 16 | a << 16)
    check("mov.b64 {_, %r1}, %a0; mov.u32 %d0, %r1;", ["u64"], "u32", lambda a: a >> 32)
    check("{ .reg .b32 t; mov.b64 {t, %r1}, %a0; { .reg .b32 t; mov.b32 t, 3; add.u32 %r1, %r1, t; } add.u32 %d0, %r1, t; }", ["u64"], "u32",
          lambda a: (a >> 32) + 3 + a)
    check("mov.b32 %d0, 0x10; add.s32 %d0, %d0, -017; add.u32 %d0, %d0, %a0;", ["u32"], "u32", lambda a: a + 1)
