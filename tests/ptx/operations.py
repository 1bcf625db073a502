"""The instructions that stay within a thread's registers, in the order of the PTX ISA's chapters."""

from .syntax import Imm, Pair, Reg, Special, Symbol, Vec
from .translate import Type, operation, width

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
_PLAIN = {"add": "+", "sub": "-", "mul": "*"}


@operation("add", "sub")
def _add(e, i):
    t, rest = e.modifiers(*INTEGERS, "f32", "f64", "f32x2", among=("rn",))
    d, a, b = e.count(3)
    _sum(e, t, rest, d, a, b, _PLAIN[i.opcode])


def _sum(e, t, rest, d, a, b, sign):
    if t.kind == "f":
        e.exactly(rest, ("rn",))  # without .rn it may be contracted with another instruction
        if t.pair:
            t.bits = 64
            e.write(d, f"settled({e.read(a, t, 'x')} {sign} {e.read(b, t, 'x')})", t, "x")
        else:
            e.write(d, f"settled({e.read(a, t)} {sign} {e.read(b, t)})", t)
    else:
        e.exactly(rest, ())
        e.write(d, f"{e.read(a, t, 'u')} {sign} {e.read(b, t, 'u')}", t, "u")


@operation("mul")
def _mul(e, i):
    t, rest = e.modifiers(*INTEGERS, "f32", "f64", "f32x2", among=("rn", "lo", "hi", "wide"))
    d, a, b = e.count(3)
    if t.kind == "f":
        _sum(e, t, rest, d, a, b, "*")
    else:
        _product(e, t, rest, d, a, b, None)


@operation("mad")
def _mad(e, i):
    t, rest = e.modifiers(*INTEGERS, "f32", among=("rn", "lo", "hi", "wide"))
    d, a, b, c = e.count(4)
    if t.kind == "f":
        _fma(e, i)
    else:
        _product(e, t, rest, d, a, b, c)


def _product(e, t, rest, d, a, b, c):
    e.exactly(rest, ("lo",), ("hi",), ("wide",))
    bits, signed, out = t.bits, t.kind == "s", t
    if rest == ("lo",):
        product = f"{e.read(a, t, 'u')} * {e.read(b, t, 'u')}"
    elif bits == 64:
        e.exactly(rest, ("hi",))
        product = (f"multiply_high_signed({e.read(a, t)}, {e.read(b, t)}).view(u64)" if signed else
                   f"multiply_high({e.read(a, t)}, {e.read(b, t)})")
    else:
        big = f"{'i' if signed else 'u'}{2 * bits}"
        product = f"{e.read(a, t)}.astype({big}) * {e.read(b, t)}.astype({big})"
        if rest == ("wide",):
            out = Type(e.i, f"u{2 * bits}")
            product = f"({product}).view(u{2 * bits})" if signed else product
        else:
            product = f"(({product}) >> {big}({bits})).astype(u{bits})"
    if c is not None:
        product = f"{product} + {e.read(c, out, 'u')}"
    e.write(d, product, out, "u")


@operation("fma")
def _fma(e, i):
    t, rest = e.modifiers("f32", "f32x2", among=("rn",))
    d, a, b, c = e.count(4)
    e.exactly(rest, ("rn",))
    if t.pair:
        t.bits = 64
    form = "X" if t.pair else "d"
    e.write(d, f"fma({e.read(a, t, form)}, {e.read(b, t, form)}, {e.read(c, t, form)})", t, "x" if t.pair else "f")


@operation("div", "rem")
def _div(e, i):
    t, rest = e.modifiers(*INTEGERS, "f32", "f64", among=("rn",))
    d, a, b = e.count(3)
    if t.kind == "f" and i.opcode == "div":
        e.exactly(rest, ("rn",))
        e.write(d, f"settled({e.read(a, t)} / {e.read(b, t)})", t)
        return
    e.exactly(rest, () if t.kind != "f" else ("an integer type",))
    divisor = e.temporary(f"G.divisor({e.read(b, t)}, {e.guard})")
    e.write(d, f"{'quotient' if i.opcode == 'div' else 'remainder'}({e.read(a, t)}, {divisor})", t)


@operation("sqrt", "rcp")
def _sqrt(e, i):
    t, rest = e.modifiers("f32", "f64", among=("rn",))
    d, a = e.count(2)
    e.exactly(rest, ("rn",))
    e.write(d, f"settled(np.sqrt({e.read(a, t)}))" if i.opcode == "sqrt" else f"settled({t.name}(1) / {e.read(a, t)})", t)


@operation("neg", "abs")
def _neg(e, i):
    t, _ = e.modifiers("s16", "s32", "s64", "f32", "f64")
    d, a = e.count(2)
    if t.kind == "f":  # the sign alone, NaN too
        top = 1 << t.bits - 1
        bits = f"{e.read(a, t, 'f')}.view(u{t.bits})"
        e.write(d, f"{bits} ^ u{t.bits}({top})" if i.opcode == "neg" else f"{bits} & u{t.bits}({top - 1})", t, "u")
    else:
        value = e.read(a, t)
        e.write(d, f"i{t.bits}(0) - {value}" if i.opcode == "neg" else f"pick({value} < 0, i{t.bits}(0) - {value}, {value})", t)


@operation("min", "max")
def _min(e, i):
    t, rest = e.modifiers(*INTEGERS, "f32", "f64", among=("NaN",))
    d, a, b = e.count(3)
    if t.kind == "f":
        e.write(d, f"minimum({e.read(a, t)}, {e.read(b, t)}, {i.opcode == 'max'}, {'NaN' in rest})", t)
    else:
        e.exactly(rest, ())
        e.write(d, f"np.{i.opcode}imum({e.read(a, t)}, {e.read(b, t)})", t)


# --------------------------------------------------------------------------------------------------- bits and shifts


@operation("and", "or", "xor")
def _logic(e, i):
    t, _ = e.modifiers("pred", "b16", "b32", "b64")
    d, a, b = e.count(3)
    sign = {"and": "&", "or": "|", "xor": "^"}[i.opcode]
    if t is None:
        e.write(d, f"{e.predicate(a)} {sign} {e.predicate(b)}", "pred", "u")
    else:
        e.write(d, f"{e.read(a, t)} {sign} {e.read(b, t)}", t)


@operation("not", "brev", "popc", "clz")
def _unary(e, i):
    t, _ = e.modifiers(*(("pred", "b16") if i.opcode == "not" else ()), "b32", "b64")
    d, a = e.count(2)
    if t is None:
        e.write(d, f"~{e.predicate(a)}", "pred", "u")
        return
    value = e.read(a, t)
    out = t if i.opcode in ("not", "brev") else Type(i, "b32")
    e.write(d, {"not": f"~{value}", "brev": f"reverse_bits({value})", "popc": f"count_bits({value}).astype(u32)",
                "clz": f"u32({t.bits - 1}) - leading_bit({value})"}[i.opcode], out)


@operation("bfind")
def _bfind(e, i):
    t, rest = e.modifiers("u32", "u64", among=("shiftamt",))
    d, a = e.count(2)
    place = f"leading_bit({e.read(a, t)})"
    if rest:
        place = f"shift_amount({place}, {t.bits - 1})"
    e.write(d, place, Type(i, "u32"))


@operation("lop3")
def _lop3(e, i):
    t, _ = e.modifiers("b32")
    d, a, b, c, table = e.count(5)
    if not isinstance(table, Imm) or not 0 <= table.value < 256:
        e.refuse("a table of 8 bits is taken")
    e.write(d, f"logic3({e.read(a, t)}, {e.read(b, t)}, {e.read(c, t)}, {table.value})", t)


@operation("shl", "shr")
def _shift(e, i):
    left = i.opcode == "shl"
    t, _ = e.modifiers("b16", "b32", "b64", *(() if left else INTEGERS))
    d, a, by = e.count(3)
    value = e.read(a, t)
    if isinstance(by, Imm) and 0 <= by.value:
        n = by.value
        kind = f"{'i' if t.form == 's' else 'u'}{t.bits}"
        if n >= t.bits and t.form == "u":
            e.write(d, f"{value} & {kind}(0)", t)
        else:
            amount = e.constant(t.dtype(min(n, t.bits - 1)))
            e.write(d, f"{value} {'<<' if left else '>>'} {amount}", t)
    else:
        e.write(d, f"shift_{'left' if left else 'right'}({value}, {e.read(by, Type(i, 'u32'))})", t)


@operation("shf")
def _shf(e, i):
    t, rest = e.modifiers("b32", among=("l", "r", "wrap", "clamp"))
    d, a, b, c = e.count(4)
    e.exactly(rest, ("l", "wrap"), ("l", "clamp"), ("r", "wrap"), ("r", "clamp"))
    e.write(d, f"funnel({e.read(a, t)}, {e.read(b, t)}, {e.read(c, t)}, {rest[0] == 'l'}, {rest[1] == 'wrap'})", t)


@operation("prmt")
def _prmt(e, i):
    t, _ = e.modifiers("b32")
    d, a, b, c = e.count(4)
    e.write(d, f"permute({e.read(a, t)}, {e.read(b, t)}, {e.read(c, t)})", t)


@operation("bfe")
def _bfe(e, i):
    t, _ = e.modifiers("u32", "s32", "u64", "s64")
    d, a, b, c = e.count(4)
    n = Type(i, "u32")
    e.write(d, f"field_extract({e.read(a, t)}, {e.read(b, n)}, {e.read(c, n)})", t)


@operation("bfi")
def _bfi(e, i):
    t, _ = e.modifiers("b32", "b64")
    d, a, b, c, f = e.count(5)
    n = Type(i, "u32")
    e.write(d, f"field_insert({e.read(a, t)}, {e.read(b, t)}, {e.read(c, n)}, {e.read(f, n)})", t)


# ------------------------------------------------------------------------------------------ comparisons and selections

_ORDERED = {"eq": "{a} == {b}", "lt": "{a} < {b}", "le": "{a} <= {b}", "gt": "{a} > {b}", "ge": "{a} >= {b}",
            "ne": "({a} < {b}) | ({a} > {b})", "num": "({a} == {a}) & ({b} == {b})"}
_OPPOSITE = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt", "nan": "num"}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def compared(e, t, comparison, a, b):
    """An expression of bools."""
    if t.kind == "f":
        a, b = e.read(a, t), e.read(b, t)
        if comparison in _OPPOSITE:
            return f"~({_ORDERED[_OPPOSITE[comparison]].format(a=a, b=b)})"
        if comparison in _ORDERED:
            return f"({_ORDERED[comparison].format(a=a, b=b)})"
    else:
        if t.kind == "u":
            comparison = _UNSIGNED.get(comparison, comparison)
        if comparison in (("eq", "ne") if t.kind == "b" else ("eq", "ne", "lt", "le", "gt", "ge")):
            sign = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}[comparison]
            return f"({e.read(a, t)} {sign} {e.read(b, t)})"
    e.refuse(f"the comparison .{comparison} of .{t.name} is not known")


@operation("setp")
def _setp(e, i):
    if len(i.modifiers) not in (2, 3):
        e.refuse("setp.comparison{.and|.or|.xor}.type is taken")
    t = Type(i, i.modifiers[-1])
    if t.dtype is None or t.bits == 8:
        e.refuse(f"the type .{t.name} is not taken here")
    combined = len(i.modifiers) == 3
    d, a, b, *c = e.count(4 if combined else 3)
    result = compared(e, t, i.modifiers[0], a, b)
    opposite = f"~{result}"
    if combined:
        sign = {"and": "&", "or": "|", "xor": "^"}.get(i.modifiers[1])
        if sign is None:
            e.refuse(f"the modifier .{i.modifiers[1]} is not known here")
        c = e.temporary(e.predicate(c[0]))
        result, opposite = f"{result} {sign} {c}", f"({opposite}) {sign} {c}"
    if isinstance(d, Pair):
        result, opposite = e.temporary(result), e.temporary(opposite)
        e.write(d.first, result, "pred", "u")
        e.write(d.second, opposite, "pred", "u")
    else:
        e.write(d, result, "pred", "u")


@operation("selp")
def _selp(e, i):
    t, _ = e.modifiers("b16", "b32", "b64", *INTEGERS, "f32", "f64")
    d, a, b, p = e.count(4)
    e.write(d, f"pick({e.predicate(p)}, {e.read(a, t)}, {e.read(b, t)})", t)


@operation("slct")
def _slct(e, i):
    if len(i.modifiers) != 2 or i.modifiers[1] not in ("s32", "f32"):
        e.refuse("slct.type.s32 or slct.type.f32 is taken")
    t, by = Type(i, i.modifiers[0]), Type(i, i.modifiers[1])
    d, a, b, c = e.count(4)
    e.write(d, f"pick({e.read(c, by)} >= 0, {e.read(a, t)}, {e.read(b, t)})", t)


# ------------------------------------------------------------------------------------------------ moves, conversions


@operation("mov")
def _mov(e, i):
    t, _ = e.modifiers("pred", "b16", "b32", "b64", *INTEGERS, "f32", "f64")
    d, a = e.count(2)
    if t is None:
        e.write(d, f"np.bool_({a.value != 0})" if isinstance(a, Imm) else e.predicate(a), "pred", "u")
    elif isinstance(d, Vec) or isinstance(a, Vec):
        _pack(e, t, d, a)
    elif isinstance(a, (Special, Symbol)):
        e.write(d, e.read(a, t, "u"), t, "u")
    elif isinstance(a, Reg) and width(a) == t.bits:
        form = next(f for f in "ufsx" if f in e.forms[a])
        e.write(d, e.form(a, form), t, form)
    else:
        e.write(d, e.read(a, t, "u"), t, "u")


def _pack(e, t, d, a):
    items = (d if isinstance(d, Vec) else a).items
    if t.kind != "b" or len(items) not in (2, 4) or t.bits // len(items) < 16:
        e.refuse("this packing is not taken")
    part = Type(e.i, f"b{t.bits // len(items)}")
    pair = t.bits == 64 and len(items) == 2  # one half may have a value where the other was never written
    if isinstance(d, Vec):
        whole = e.read(a, t, "u")
        for k, item in enumerate(items):
            if pair:
                e.made_of = tuple((n, k) for n, _ in e.made_of)
            piece = f"({whole} >> u{t.bits}({k * part.bits}))" if k else whole
            e.write(item, f"{piece}.astype(u{part.bits})", part, "u")
    else:
        if pair:
            e.halves = [((e.number(item), None),) if isinstance(item, Reg) else () for item in items]
        pieces = (f"{e.read(item, part, 'u')}.astype(u{t.bits})" for item in items)
        e.write(d, " | ".join(f"{piece} << u{t.bits}({k * part.bits})" if k else piece for k, piece in enumerate(pieces)), t, "u")


@operation("cvta")
def _cvta(e, i):
    spaces = ("global", "shared", "local", "const", "param")
    t, rest = e.modifiers("u64", among=("to", *spaces))
    d, a = e.count(2)
    to, space = (rest[:1] == ("to",), rest[-1] if rest else "")
    e.exactly(rest, ("to", space) if to else (space,))
    if space not in spaces:
        e.refuse("a state space is missing")
    value = e.read(a, t, "u")
    e.write(d, value if space in ("global", "const") else f"{value} {'-' if to else '+'} WINDOW_{space}", t, "u")


_ROUNDS = ("rn", "rni", "rzi", "rmi", "rpi")


@operation("cvt")
def _cvt(e, i):
    if len(i.modifiers) < 2:
        e.refuse("cvt{.rounding}.type.type is taken")
    *rest, to, from_ = i.modifiers
    if len(rest) > 1 or any(m not in _ROUNDS for m in rest):
        e.refuse(f"the modifier .{next((m for m in rest if m not in _ROUNDS), rest[0])} is not known here")
    rounding = rest[0] if rest else ""
    d, *a = e.count(3 if to.endswith("x2") else 2)
    if to in ("f16x2", "bf16x2"):
        if rounding != "rn" or from_ != "f32":
            e.refuse("only the conversion of two float32 with .rn is taken")
        t = Type(i, "f32")
        high, low = (f"to_{'half' if to == 'f16x2' else 'bfloat'}({e.read(x, t)})" for x in a)
        e.write(d, f"{high}.astype(u32) << u32(16) | {low}", Type(i, "b32"))
        return
    t, s = Type(i, to), Type(i, from_)
    if "b" in (t.kind, s.kind) or s.pair or 128 in (t.bits, s.bits):
        e.refuse("these types are not taken")
    _convert(e, d, a[0], t, s, rounding)


def _convert(e, d, a, t, s, rounding):
    floats = ("f", "bf")
    need = None
    if t.kind in floats and s.kind in floats:
        need = ("rni", "rzi", "rmi", "rpi") if t.name == s.name else ("rn",) if t.bits < s.bits else ("",)
        wide = {"f16": "from_half({})", "bf16": "from_bfloat({})"}.get(s.name, "{}")
        value = wide.format(e.read(a, s, "u" if s.bits == 16 else "f"))
        if t.name == s.name and s.bits >= 32:
            value = f"round_float({value}, {rounding!r})"
        elif t.name == "f64" and s.bits <= 32 or (t.name, s.name) == ("f32", "f64"):
            value = f"settled({value}.astype({t.name}))"
        elif t.bits == 16 and s.name == "f32":
            value = f"{'to_half' if t.kind == 'f' else 'to_bfloat'}({value})"
        elif (t.name, s.bits) != ("f32", 16):
            e.refuse("this conversion is not known")
        form = "u" if t.bits == 16 else "f"
    elif t.kind in floats:
        need, form = ("rn",), "f"
        if t.bits == 16:
            e.refuse("this conversion is not known")
        value = f"{e.read(a, s, wider=True)}.astype({t.name})"
    elif s.kind in floats:
        need, form = ("rni", "rzi", "rmi", "rpi"), t.form
        if s.bits == 16 or t.bits == 8:
            e.refuse("this conversion is not known")
        value = f"float_to_int({e.read(a, s)}, {'i' if t.kind == 's' else 'u'}{t.bits}, {rounding!r})"
    else:
        need, form = ("",), t.form
        value = f"{e.read(a, s, wider=True)}.astype({'i' if t.kind == 's' else 'u'}{t.bits})"
    if rounding not in need:
        e.refuse(f"a rounding of {' or '.join(need)} is taken" if need != ("",) else "no rounding is taken")
    if isinstance(d, Reg) and d.type != "pred" and width(d) > t.bits and t.kind not in floats:  # extended to the register
        wide = Type(e.i, f"{t.kind}{width(d)}")
        value, t, form = f"{value}.astype({'i' if t.kind == 's' else 'u'}{width(d)})", wide, wide.form
    e.write(d, value, t, form)
