"""PTX statements: operands, instructions, registers, variables, bodies. Nothing is guessed: what is not understood is an error
with its line."""

import functools
import re
from dataclasses import dataclass, field

import numpy as np


class PtxError(Exception):
    """PTX that cannot be understood, or that did at run time what is not defined. The message names line and text."""


@dataclass(frozen=True)
class Reg:
    name: str
    type: str  # "pred", "b16", "b32" or "b64"


@dataclass(frozen=True)
class Imm:
    """An immediate: ``value`` is an int, or for 0f and 0d literals the bits."""

    value: int
    float_bits: int = 0  # 32 or 64 where it was written as a float


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Symbol:
    """A variable or a label by name."""

    name: str


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Address:
    base: object  # Reg, Symbol or Imm
    offset: int


@dataclass(frozen=True)
class Pair:
    """``p|q``: two destinations."""

    first: object
    second: object


@dataclass(frozen=True)
class Not:
    operand: object


SINK = Symbol("_")


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    opcode: str
    modifiers: tuple
    operands: tuple
    predicate: tuple | None  # (Reg, negated)
    scope: tuple = field(repr=False, default=(), compare=False)

    @functools.cached_property
    def name(self):
        return ".".join((self.opcode, *self.modifiers))

    @functools.cached_property
    def sets(self):
        """The registers written."""
        from .translate import destinations

        return destinations(self)

    @functools.cached_property
    def uses(self):
        """The registers read, without the guard."""
        from .translate import sources

        return sources(self)


@dataclass(frozen=True)
class Variable:
    """A variable of the state space "shared", "local", "global" or "const"."""

    name: str
    space: str
    size: int
    align: int
    initial: bytes
    external: bool = False


SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
         "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16}
_REGISTER_TYPES = {"pred": "pred", **{t: f"b{8 * s}" for t, s in SIZES.items() if s in (2, 4, 8)}}
_NUMBER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_NAME = re.compile(r"[A-Za-z_$%][\w$]*$")
_STATEMENT = re.compile(r"(?:@(!?)\s*(\S+)\s+)?([a-z][a-z0-9_]*)((?:\.[\w:]+)*)\s*(.*)$", re.S)


def fail(line, text, message):
    raise PtxError(f"line {line}: {' '.join(text.split())}\n  {message}")


def number(text, line, whole):
    """A literal as Imm, or None where the text is none."""
    t = text.strip()
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", t):
        return Imm(int(t[2:], 16), 32)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", t):
        return Imm(int(t[2:], 16), 64)
    if _NUMBER.match(t):
        t = t.rstrip("U")
        digits = t.lstrip("+-")
        octal = digits.startswith("0") and digits.isdigit() and len(digits) > 1
        return Imm(int(t, 8 if octal else 0))
    if t[:1].isdigit():
        fail(line, whole, f"the literal {t} is not taken")
    return None


def split(text):
    """At commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


class Registers:
    """The registers of a body. Scopes are tuples of ids, the innermost last."""

    def __init__(self):
        self.single, self.ranges = {}, {}

    def declare(self, scope, type_, names, line, text):
        if type_ not in _REGISTER_TYPES:
            fail(line, text, f"registers of type .{type_} are not taken")
        for name in names:
            match = re.fullmatch(r"(.+)<(\d+)>", name)
            if match:
                self.ranges[(scope, match[1])] = (int(match[2]), _REGISTER_TYPES[type_])
            else:
                self.single[(scope, name)] = _REGISTER_TYPES[type_]

    def find(self, scope, name):
        for depth in range(len(scope), -1, -1):
            here = scope[:depth]
            suffix = "".join(f"#{i}" for i in here)
            if (here, name) in self.single:
                return Reg(name + suffix, self.single[(here, name)])
            match = re.fullmatch(r"(.*?)(\d+)", name)
            if match and (here, match[1]) in self.ranges:
                count, type_ = self.ranges[(here, match[1])]
                if int(match[2]) < count:
                    return Reg(name + suffix, type_)
        return None


def operand(text, registers, scope, line, whole):
    t = text.strip()
    parse = functools.partial(operand, registers=registers, scope=scope, line=line, whole=whole)
    if not t:
        fail(line, whole, "an operand is missing")
    if t[0] == "{":
        return Vec(tuple(parse(part) for part in split(t[1:-1])))
    if t[0] == "[":
        inside = t[1:-1].strip()
        match = re.fullmatch(r"([\w$%]+)\s*(?:([+-])\s*(-?\w+))?", inside)
        if not match:
            fail(line, whole, f"the address {t} is not understood")
        offset = 0
        if match[3]:
            value = number(match[3], line, whole)
            if value is None:
                fail(line, whole, f"the address {t} is not understood")
            offset = value.value if match[2] == "+" else -value.value
        return Address(parse(match[1]), offset)
    if t[0] == "(":
        return Vec(tuple(parse(part) for part in split(t[1:-1])))
    if t[0] == "!":
        return Not(parse(t[1:]))
    if "|" in t:
        return Pair(*(parse(part) for part in t.split("|")))
    if t == "_":
        return SINK
    value = number(t, line, whole)
    if value is not None:
        return value
    found = registers.find(scope, t)
    if found:
        return found
    if re.fullmatch(r"%[\w.]+", t):
        return Special(t)
    if _NAME.match(t):
        return Symbol(t)
    fail(line, whole, f"the operand {t} is not understood")


def instruction(text, line, registers, scope):
    match = _STATEMENT.match(text.strip())
    if not match:
        fail(line, text, "this statement is not understood")
    predicate = None
    if match[2]:
        reg = registers.find(scope, match[2])
        if reg is None or reg.type != "pred":
            fail(line, text, f"{match[2]} is not a declared predicate")
        predicate = (reg, match[1] == "!")
    modifiers = tuple(match[4].split(".")[1:])
    operands = tuple(operand(part, registers, scope, line, text) for part in split(match[5]))
    return Instruction(line, " ".join(text.split()), match[3], modifiers, operands, predicate, scope)


_VARIABLE = re.compile(r"(?P<flags>(?:\.(?:visible|extern|weak|common)\s+)*)\.(?P<space>shared|local|global|const)\s+"
                       r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$%]+)\s*(?P<dims>(?:\[\s*\d*\s*\]\s*)*)"
                       r"(?:=\s*(?P<init>.*))?$", re.S)


def variable(text, line):
    match = _VARIABLE.match(text.strip())
    if not match or match["type"] not in SIZES:
        fail(line, text, "this variable is not understood")
    size = SIZES[match["type"]]
    dims = [int(d) if d.strip() else 0 for d in re.findall(r"\[\s*(\d*)\s*\]", match["dims"])]
    count = int(np.prod(dims, dtype=np.int64)) if dims else 1
    initial = b""
    if match["init"]:
        values = [number(v, line, text) for v in re.sub(r"[{}]", " ", match["init"]).split(",")]
        if None in values:
            fail(line, text, "only numbers are taken as initial values")
        initial = b"".join((v.value & (1 << 8 * size) - 1).to_bytes(size, "little") for v in values)
    return Variable(match["name"], match["space"], size * count, int(match["align"] or size), initial, "extern" in match["flags"])


class Body:
    """What stands between the braces of a kernel."""

    def __init__(self, text, first_line):
        self.registers, self.instructions, self.labels, self.variables, self.targets = Registers(), [], {}, [], {}
        self._read(text, first_line)

    def _read(self, text, line):
        scope, next_scope, at = (), 1, 0
        token = re.compile(r"\s+|\.(?:loc|file)\b[^\n]*|[{}]|([\w$]+)\s*:(?!:)|[^;]*;")
        while at < len(text):
            match = token.match(text, at)
            if not match:
                if text[at:].strip():
                    fail(line, text[at:at + 80], "this statement is not ended")
                break
            piece, here = match[0], line
            line += piece.count("\n")
            at = match.end()
            if piece.isspace() or re.match(r"\.(loc|file)\b", piece):
                continue
            if piece == "{":
                scope, next_scope = (*scope, next_scope), next_scope + 1
            elif piece == "}":
                scope = scope[:-1]
            elif match[1]:
                if match[1] in self.labels:
                    fail(here, piece, "this label stands twice")
                self.labels[match[1]] = len(self.instructions)
            else:
                self._statement(piece[:-1].strip(), here, scope)

    def _statement(self, text, line, scope):
        if text.startswith(".reg"):
            match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S)
            if not match:
                fail(line, text, "this declaration is not understood")
            self.registers.declare(scope, match[1], [n.strip() for n in match[2].split(",")], line, text)
        elif text.startswith((".shared", ".local")):
            self.variables.append(variable(text, line))
        elif text.startswith(".branchtargets"):
            name = next(k for k, v in reversed(self.labels.items()) if v == len(self.instructions))
            self.targets[name] = [t.strip() for t in text[len(".branchtargets"):].split(",")]
        elif text.startswith(".pragma"):
            if not re.fullmatch(r'\.pragma\s+"(nounroll|used_bytes_mask \w+|enable_smem_spilling)"', text):
                fail(line, text, "this pragma is not known")
        elif text.startswith("."):
            fail(line, text, "this directive is not known")
        elif text:
            self.instructions.append(instruction(text, line, self.registers, scope))
