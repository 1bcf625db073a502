"""Instructions to Python source: each register becomes local variables, one for each way its bits are read.

A variable ends in its form: u unsigned bits (bool for predicates), s signed, f float, d a float32 widened to float64,
x the pair of float32 in 64 bits as (threads, 2), X that pair widened. A value that all threads share is a NumPy scalar.
"""

import re

import numpy as np

from .syntax import SINK, Address, Imm, Not, Pair, PtxError, Reg, Special, Symbol, Vec

OPERATIONS = {}
_TYPE = re.compile(r"(u|s|b|f|bf)(8|16|32|64|128)(x2)?$")
_DTYPES = {"u": np.uint64, "s": np.int64, "f": np.float64}
DTYPES = {"u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "s8": np.int8, "s16": np.int16, "s32": np.int32,
          "s64": np.int64, "f32": np.float32, "f64": np.float64}


def operation(*names):
    def register(function):
        for name in names:
            OPERATIONS[name] = function
        return function

    return register


def refuse(i, message):
    raise PtxError(f"line {i.line}: {i.text}\n  {message}")


class Type:
    """``kind`` is u, s, b, f or bf; ``form`` how a register of this type is read."""

    def __init__(self, i, name):
        match = _TYPE.match(name)
        if not match:
            refuse(i, f"the type .{name} is not taken here")
        self.name, self.kind, self.bits, self.pair = name, match[1], int(match[2]), bool(match[3])
        self.form = {"b": "u", "bf": "u"}.get(self.kind, self.kind)
        self.dtype = DTYPES.get(("u" if self.kind == "b" else self.kind) + match[2])


def width(reg):
    return 1 if reg.type == "pred" else int(reg.type[1:])


class Emitter:
    """The source of one chunk. checked: registers carry masks of the threads in which they were written."""

    def __init__(self, kernel, number, checked):
        self.kernel, self.number, self.checked = kernel, number, checked
        self.lines, self.where, self.forms, self.constants = [], [], {}, {}
        self.at, self.guard, self.temporaries = 0, None, 0
        self.i, self.made_of, self.chosen, self.halves = None, (), "", None

    # ---------------------------------------------------------------------------------------------------- lines, names

    def line(self, text):
        self.lines.append(text)
        self.where.append(self.at)

    def temporary(self, text):
        self.temporaries += 1
        name = f"t{self.temporaries}"
        self.line(f"{name} = {text}")
        return name

    def constant(self, value):
        """The name of a NumPy scalar."""
        name = f"k{value.dtype.str[1:]}_{value.tobytes().hex()}"
        self.constants[name] = value
        return name

    def refuse(self, message):
        refuse(self.i, message)

    # ------------------------------------------------------------------------------------------------------- registers

    def start(self, reg):
        """A register that the chunk is entered with."""
        self.forms[reg] = {"u"}

    def form(self, reg, want):
        """The variable of a register in a form."""
        n = self.number(reg)
        have = self.forms[reg]
        if want not in have:
            name = f"r{n}{want}"
            if want == "d":
                self.line(f"{name} = {self.form(reg, 'f')}.astype(f64)")
            elif want == "X":
                self.line(f"{name} = {self.form(reg, 'x')}.astype(f64)")
            elif want == "x":
                self.line(f"{name} = pairs({self.form(reg, 'u')})")
            elif "x" in have and "u" not in have:
                self.line(f"r{n}u = unpaired(r{n}x)")
                have.add("u")
                return self.form(reg, want)
            else:
                source = next(f for f in "ufs" if f in have)
                bits = width(reg)
                dtype = {"u": "u", "s": "i", "f": "f"}[want] + str(bits)
                self.line(f"{name} = r{n}{source}.view({dtype})")
            have.add(want)
        return f"r{n}{want}"

    def read(self, operand, type_, form=None, wider=False):
        """An expression of the operand as a value of the type."""
        form = form or type_.form
        if isinstance(operand, Imm):
            return self.immediate(operand, type_, form)
        if isinstance(operand, Special):
            return f"G.special({operand.name!r})" if self.special(operand, type_) else None
        if isinstance(operand, Symbol):
            if type_.bits not in (32, 64) or form != "u":
                self.refuse(f"the variable {operand.name} as a .{type_.name}")
            self.known(operand)
            return f"G.address({operand.name!r}, u{type_.bits})"
        if not isinstance(operand, Reg) or operand.type == "pred":
            self.refuse("this operand is not taken here")
        bits = width(operand)
        if bits == type_.bits:
            return self.form(operand, form)
        if bits > type_.bits and wider:
            narrowed = f"{self.form(operand, 'u')}.astype(u{type_.bits})"
            return narrowed if form == "u" else self.temporary(f"{narrowed}.view({form.replace('s', 'i')}{type_.bits})")
        self.refuse(f"{operand.name} has {bits} bits where .{type_.name} is taken")

    def known(self, symbol):
        if symbol.name not in self.kernel.variables:
            self.refuse(f"{symbol.name} is not declared")

    def special(self, operand, type_):
        if not re.fullmatch(r"%(?:(?:n?tid|n?ctaid)\.[xyz]|laneid|warpid|nwarpid|lanemask_(?:eq|lt|le|gt|ge))", operand.name):
            self.refuse(f"the special register {operand.name} is not known")
        if type_.bits != 32 or type_.form == "f":
            self.refuse(f"the special register {operand.name} has 32 bits")
        return True

    def immediate(self, imm, type_, form):
        bits = type_.bits
        if form in ("f", "d") and imm.float_bits != bits:
            self.refuse(f"a float literal of {bits} bits (0f... or 0d...) is taken here")
        if form in ("x", "X"):
            self.refuse("a literal is not taken here")
        if imm.float_bits and imm.float_bits != bits:
            self.refuse(f"a literal of {imm.float_bits} bits where .{type_.name} is taken")
        if not -(1 << bits - 1) <= imm.value < 1 << bits:
            self.refuse(f"the literal {imm.value} does not fit .{type_.name}")
        value = np.array([imm.value & (1 << bits) - 1], np.uint64).astype(f"u{bits // 8}")[0]
        if form == "s":
            value = value.view(f"i{bits // 8}")
        elif form in ("f", "d"):
            value = value.view(f"f{bits // 8}")
        return self.constant(value.astype(np.float64) if form == "d" else value)

    def predicate(self, operand):
        if isinstance(operand, Not):
            return f"(~{self.predicate(operand.operand)})"
        if not isinstance(operand, Reg) or operand.type != "pred":
            self.refuse("a predicate is taken here")
        return self.form(operand, "u")

    def write(self, operand, expression, type_, form=None):
        """Sets a register; under a guard, in the threads where it holds."""
        form = form or type_.form
        if operand == SINK:
            self.temporary(expression)
            return
        bits = 1 if type_ == "pred" else type_.bits
        if not isinstance(operand, Reg) or width(operand) != bits:
            self.refuse(f"{getattr(operand, 'name', 'this operand')} as the destination of {bits} bits")
        n = self.number(operand)
        if self.guard:
            new = self.temporary(expression)
            if operand not in self.forms:
                self.start(operand)
            old = self.form(operand, form)
            expression = f"pick({self.guard}, {new}, {old})"
        self.line(f"r{n}{form} = {expression}")
        self.forms[operand] = {form}
        if self.checked:
            if self.halves:
                self.line(f"G.written_halves({n}, {self.guard}, {self.halves[0]}, {self.halves[1]})")
            else:
                self.line(f"G.written({n}, {self.guard}, {self.made_of}{self.chosen})")

    # ---------------------------------------------------------------------------------------------------- instructions

    def instruction(self, i, at):
        self.i, self.at, self.guard, self.made_of, self.chosen, self.halves = i, at, None, (), "", None
        if self.checked:
            hard = tuple(self.number(r) for r in i.uses)
            if i.opcode in HARMLESS:
                self.made_of, hard = tuple((n, None) for n in hard), ()
            if i.modifiers[-1:] == ("f32x2",):
                self.halves = [tuple((n, half) for n, _ in self.made_of) for half in (0, 1)]
            if i.opcode == "selp":
                a, b = (self.number(o) if isinstance(o, Reg) else None for o in i.operands[1:3])
                self.made_of = ((self.number(i.operands[3]), None),)
                self.chosen = f", pick({self.form(i.operands[3], 'u')}, G.has({a}), G.has({b}))"
            if i.predicate:
                self.line(f"G.must_have(({self.number(i.predicate[0])},), None)")
            guard = f"{'~' if i.predicate[1] else ''}{self.form(i.predicate[0], 'u')}" if i.predicate else "None"
            self.line(f"G.must_have({hard}, {guard})")
        function = OPERATIONS.get(i.opcode)
        if function is None:
            self.refuse(f"the instruction {i.opcode} is not known")
        if i.predicate:
            if i.opcode in WARP_OPERATIONS:
                self.refuse("a guard is not taken on an instruction of a whole warp")
            p = self.form(i.predicate[0], "u")
            self.guard = self.temporary(f"~{p}") if i.predicate[1] else self.temporary(p)
        function(self, i)

    def modifiers(self, *allowed_last, among=()):
        """The type, after checking that every other modifier is one of ``among``."""
        *rest, last = self.i.modifiers or ("",)
        unknown = [m for m in rest if m not in among]
        if unknown:
            self.refuse(f"the modifier .{unknown[0]} is not known here")
        if len(set(rest)) != len(rest):
            self.refuse("a modifier stands twice")
        if last not in allowed_last:
            self.refuse(f"the type .{last} is not taken here" if last else "a type is missing")
        return None if last == "pred" else Type(self.i, last), tuple(rest)

    def exactly(self, modifiers, *sets):
        if modifiers not in sets:
            taken = " or ".join(".".join(s) or "none" for s in sets)
            self.refuse(f"the modifiers {'.'.join(modifiers) or '(none)'} are not taken here: {taken}")

    def count(self, n):
        if len(self.i.operands) != n:
            self.refuse(f"{len(self.i.operands)} operands: {n} are taken")
        return self.i.operands


# They may compute with what was never written, as compilers do ahead of a branch that then makes no use of it: the result
# is then as good as not written.
HARMLESS = {"mov", "add", "sub", "mul", "mad", "fma", "neg", "abs", "min", "max", "and", "or", "xor", "not", "shl", "shr", "shf", "prmt",
            "lop3", "bfe", "bfi", "bfind", "brev", "popc", "clz", "sqrt", "rcp", "cvt", "cvta", "setp", "selp", "slct"}
# Executed by the threads of a warp together: each starts a chunk of its own.
WARP_OPERATIONS = {"shfl", "vote", "redux", "activemask", "match", "elect"}
CONTROL = {"bra", "brx", "ret", "exit", "bar", "barrier", "trap"}
NO_DESTINATION = {"st", "red", "membar", "fence", "prefetch", "griddepcontrol", "nanosleep", *CONTROL}


def _registers(operand):
    if isinstance(operand, Reg):
        return (operand,)
    if isinstance(operand, Vec):
        return tuple(r for item in operand.items for r in _registers(item))
    if isinstance(operand, Address):
        return _registers(operand.base)
    if isinstance(operand, Pair):
        return (*_registers(operand.first), *_registers(operand.second))
    return _registers(operand.operand) if isinstance(operand, Not) else ()


def destinations(i):
    return () if i.opcode in NO_DESTINATION or not i.operands else _registers(i.operands[0])


def sources(i):
    """Registers read, without the guard."""
    rest = i.operands if i.opcode in NO_DESTINATION else i.operands[1:]
    return tuple(r for o in rest for r in _registers(o))
