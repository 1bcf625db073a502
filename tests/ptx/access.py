"""The instructions that reach beyond a thread's registers: memory, atomics, the warp, fences."""

import re

from .syntax import SIZES, SINK, Address, Imm, Pair, Symbol, Vec
from .translate import Type, operation

SPACES = ("global", "shared", "local", "param", "const")
_ORDER = ("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio")
_SCOPES = ("cta", "cluster", "gpu", "sys")
_HINTS = ("nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
          "L1::evict_last", "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last",
          "L2::evict_normal", "L2::cache_hint")
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_MEMORY_TYPES = tuple(t for t in SIZES if t not in ("f16", "bf16"))


def _decode(e, i):
    """(space, elements, type, has a cache policy); "" is generic."""
    t, rest = e.modifiers(*_MEMORY_TYPES, among=(*_ORDER, *_SCOPES, *_HINTS, *_VECTORS, *SPACES, "shared::cta"))
    rest = ["shared" if m == "shared::cta" else m for m in rest]
    spaces, vectors = [m for m in rest if m in SPACES], [m for m in rest if m in _VECTORS]
    if len(spaces) > 1 or len(vectors) > 1:
        e.refuse("two state spaces or two vector widths")
    if t.bits == 128:
        e.refuse("registers of 128 bits are not taken")
    count = _VECTORS[vectors[0]] if vectors else 1
    if count * t.bits > 256 or count == 8 and t.bits != 32:
        e.refuse(f"a vector of {count} .{t.name} is not taken")
    return spaces[0] if spaces else "", count, t, "L2::cache_hint" in rest


def _address(e, operand):
    """An expression of the uint64 address."""
    if not isinstance(operand, Address):
        e.refuse("an address in brackets is taken")
    base, offset = operand.base, operand.offset
    if isinstance(base, Imm):
        return f"u64({base.value + offset & (1 << 64) - 1})"
    if isinstance(base, Symbol):
        e.known(base)
        return f"u64(G.address({base.name!r}, u64) + u64({offset & (1 << 64) - 1}))"
    if base.type == "b32":
        text = f"{e.read(base, Type(e.i, 'b32'))}.astype(u64)"
    else:
        text = e.read(base, Type(e.i, "b64"))
    return f"{text} + u64({offset & (1 << 64) - 1})" if offset else text


def _elements(e, operand, count):
    items = operand.items if isinstance(operand, Vec) else (operand,)
    if len(items) != count:
        e.refuse(f"{len(items)} registers for {count} elements")
    return items


def _extended(e, d, t, value):
    """(expression, type, form) of a loaded element in a register that may be wider."""
    size = t.bits
    if d == SINK:
        return value, Type(e.i, f"b{size}"), "u"
    wide = int(d.type[1:]) if d.type != "pred" else 1
    if wide < size or t.kind == "f" and wide != size or wide == 1:
        e.refuse(f"{d.name} is too narrow for .{t.name}" if wide < size else f"{d.name} has {wide} bits where .{t.name} is taken")
    if wide > size:
        value = f"{value}.view(i{size}).astype(i{wide}).view(u{wide})" if t.kind == "s" else f"{value}.astype(u{wide})"
    return value, Type(e.i, f"b{wide}"), "u"


@operation("ld")
def _ld(e, i):
    space, count, t, policy = _decode(e, i)
    d, a, *_ = e.count(3 if policy else 2)
    items = _elements(e, d, count)
    size = t.bits // 8
    if space == "param" and isinstance(a, Address) and isinstance(a.base, Symbol):
        at = e.kernel.param_offset(a.base.name, i) + a.offset
        if at % (size * count):
            e.refuse(f"misaligned: {size * count} bytes at offset {at} of the parameters")
        if not 0 <= at <= e.kernel.param_bytes - size * count:
            e.refuse(f"out of bounds: {size * count} bytes at offset {at} of {e.kernel.param_bytes} bytes of parameters")
        values = [f"G.parameters[{size}][{at // size + k}]" for k in range(count)]
        e.line(f"G.count_param({size * count})")
    else:
        out = e.temporary(f"G.load({e.at}, {space!r}, {_address(e, a)}, {size}, {count}, {e.guard})")
        values = [out] if count == 1 else [f"{out}[{k}]" for k in range(count)]
    for item, value in zip(items, values):
        e.write(item, *_extended(e, item, t, value))


@operation("st")
def _st(e, i):
    space, count, t, policy = _decode(e, i)
    if space in ("param", "const"):
        e.refuse(f"stores to .{space} are not taken")
    a, d, *_ = e.count(3 if policy else 2)
    values = [e.read(item, Type(i, f"b{t.bits}"), wider=True) for item in _elements(e, d, count)]
    e.line(f"G.store({e.at}, {space!r}, {_address(e, a)}, ({', '.join(values)},), {t.bits // 8}, {e.guard})")


_ATOMIC = {"add": ("u32", "s32", "u64", "s64"), "min": ("u32", "s32", "u64", "s64"), "max": ("u32", "s32", "u64", "s64"),
           "and": ("b32", "b64"), "or": ("b32", "b64"), "xor": ("b32", "b64"), "exch": ("b32", "b64"), "cas": ("b32", "b64")}


@operation("atom", "red")
def _atom(e, i):
    t, rest = e.modifiers("u32", "s32", "b32", "u64", "s64", "b64",
                          among=(*_ORDER, *_SCOPES, "global", "shared", "shared::cta", *_ATOMIC))
    kinds = [m for m in rest if m in _ATOMIC]
    if len(kinds) != 1 or t.name not in _ATOMIC[kinds[0]]:
        e.refuse(f"the atomic operation {'.'.join(kinds)}.{t.name} is not known")
    kind = kinds[0]
    space = next((m.split("::")[0] for m in rest if m.startswith(("global", "shared"))), "")
    returns = i.opcode == "atom"
    if not returns and kind in ("exch", "cas"):
        e.refuse(f"red does not take .{kind}")
    *d, a, b = e.count(returns + (3 if kind == "cas" else 2)) if kind != "cas" else e.count(4)[:3]
    values = [e.read(x, t) for x in ((b,) if kind != "cas" else i.operands[2:])]
    arguments = f"{e.at}, {space!r}, {_address(e, a)}, {kind!r}, ({', '.join(values)},), {t.bits // 8}, {e.guard}"
    out = e.temporary(f"G.atomic({arguments})")
    if returns:
        e.write(d[0], f"{out}.view({'i' if t.form == 's' else 'u'}{t.bits})", t)


# ------------------------------------------------------------------------------------------------------------- the warp


def _lanes(e, operand):
    return e.read(operand, Type(e.i, "b32"))


@operation("shfl")
def _shfl(e, i):
    if not re.fullmatch(r"sync\.(up|down|bfly|idx)\.b32", ".".join(i.modifiers)):
        e.refuse("shfl.sync.(up|down|bfly|idx).b32 is taken")
    d, a, b, c, mask = e.count(5)
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    t = Type(i, "b32")
    out = e.temporary(f"G.shuffle({i.modifiers[1]!r}, {e.read(a, t)}, {e.read(b, t)}, {e.read(c, t)}, {_lanes(e, mask)})")
    e.write(first, f"{out}[0]", t)
    if second is not None:
        e.write(second, f"{out}[1]", "pred", "u")


@operation("vote")
def _vote(e, i):
    if not re.fullmatch(r"sync\.((all|any|uni)\.pred|ballot\.b32)", ".".join(i.modifiers)):
        e.refuse("vote.sync.(all|any|uni).pred or vote.sync.ballot.b32 is taken")
    d, a, mask = e.count(3)
    out = f"G.vote({i.modifiers[1]!r}, {e.predicate(a)}, {_lanes(e, mask)})"
    e.write(d, out, Type(i, "b32") if i.modifiers[2] == "b32" else "pred", "u")


@operation("activemask")
def _activemask(e, i):
    t, _ = e.modifiers("b32")
    e.write(*e.count(1), "G.active_mask()", t)


@operation("redux")
def _redux(e, i):
    t, rest = e.modifiers("u32", "s32", "b32", among=("sync", "add", "min", "max", "and", "or", "xor"))
    kind = rest[-1] if rest else ""
    if rest != ("sync", kind) or kind not in _ATOMIC or (kind in ("and", "or", "xor")) != (t.name == "b32"):
        e.refuse("redux.sync.(add|min|max).(u32|s32) or redux.sync.(and|or|xor).b32 is taken")
    d, a, mask = e.count(3)
    e.write(d, f"G.reduce({kind!r}, {e.read(a, t)}, {_lanes(e, mask)})", t)


# ------------------------------------------------------------------------------------------- what has no effect on bits


@operation("membar", "fence")
def _fence(e, i):
    e.count(0)
    known = {"cta", "gl", "sys", "gpu", "cluster", "sc", "acq_rel", "acquire", "release"}
    if not i.modifiers or set(i.modifiers) - known:
        e.refuse(f"the modifier .{'.'.join(i.modifiers)} is not known here")


@operation("griddepcontrol")
def _griddepcontrol(e, i):
    e.count(0)
    e.exactly(i.modifiers, ("wait",), ("launch_dependents",))


@operation("prefetch")
def _prefetch(e, i):
    if not re.fullmatch(r"(global\.|local\.)?L[12]|global\.L2::evict_(last|normal)", ".".join(i.modifiers)):
        e.refuse("this prefetch is not known")
    _address(e, *e.count(1))


@operation("createpolicy")
def _createpolicy(e, i):
    """A cache policy moves no bits: the register is set so that reading it is defined."""
    if not re.fullmatch(r"fractional\.L2::evict_(first|last)\.b64", ".".join(i.modifiers)):
        e.refuse("this cache policy is not known")
    e.write(i.operands[0], "u64(0)", Type(i, "b64"))
