"""A kernel cut into chunks: straight pieces of code, each one Python function. Also: which registers live where."""

import re
from collections import Counter

import numpy as np

from . import arithmetic
from .access import SPACES  # noqa: F401  registers the instructions
from .memory import WINDOWS
from .operations import INTEGERS  # noqa: F401  registers the instructions
from .syntax import Imm, PtxError, Reg, Symbol
from .translate import CONTROL, WARP_OPERATIONS, Emitter, Type, refuse

LONGEST = 48  # instructions a chunk, so that one that changes is soon compiled again


def pairs(x):
    """uint64 as (..., 2) float32, the low word first."""
    return np.ascontiguousarray(np.atleast_1d(x)).view(np.float32).reshape(*np.shape(x), 2)


def unpaired(x):
    return np.ascontiguousarray(x).view(np.uint64)[..., 0]


def shift_amount(place, top):
    return np.where(place == np.uint32(0xFFFFFFFF), place, np.uint32(top) - place)[()]


_GLOBALS = {k: v for k, v in vars(arithmetic).items() if not k.startswith("__")}
_GLOBALS.update(i8=np.int8, i16=np.int16, pairs=pairs, unpaired=unpaired, shift_amount=shift_amount, np=np,
                **{f"WINDOW_{space}": np.uint64(base) for space, base in WINDOWS.items()})


class Chunk:
    """Instructions [first, last) and how they end: ("next",), ("bra", chunk), ("brx", chunks), ("exit",) or ("bar", ...)."""

    def __init__(self, first, last):
        self.first, self.last = first, last
        self.count = last - first
        self.end, self.successors = ("next",), ()
        self.use = self.kill = self.live = self.live_out = 0  # registers as bits
        self.names = self.fast = self.checked = None
        self._live_in = (0, ())

    @property
    def live_in(self):
        """The numbers of the registers that live where the chunk begins."""
        if self._live_in[0] != self.live:
            self._live_in = (self.live, _bits(self.live))
        return self._live_in[1]

    def copy(self):
        other = object.__new__(Chunk)
        other.__dict__.update(self.__dict__, names=None, fast=None, checked=None)
        return other


class Program:
    """The chunks of a kernel. parent, index: the program of a kernel that differs in this instruction, to start from."""

    def __init__(self, kernel, parent=None, index=None):
        self.kernel, self.instructions = kernel, kernel.instructions
        if parent is None:
            self.numbers, self.registers = {}, []
            self.params = {name: offset for name, offset, _, _ in kernel.params}
            self.param_bytes = kernel.param_bytes
            self.variables = {*kernel.layout[0], *self.params, *(v.name for v in kernel.module.variables if not v.external)}
            self.masks = [self._mask(i) for i in self.instructions]
        else:
            shared = ("numbers", "registers", "params", "param_bytes", "variables")
            self.__dict__.update({name: getattr(parent, name) for name in shared}, masks=list(parent.masks))
            self.masks[index] = self._mask(self.instructions[index])
            special = CONTROL | WARP_OPERATIONS
            if not {self.instructions[index].opcode, parent.instructions[index].opcode} & special:
                self._take(parent, index)
                return
        self._cut()
        for chunk in self.chunks:
            self._summarize(chunk)
        self._live()

    def _take(self, parent, index):
        """The parent's chunks, but for the one that holds the instruction. What lived there may still seem to live."""
        self.chunks, self.chunk_at = list(parent.chunks), parent.chunk_at
        n = next(n for n, chunk in enumerate(self.chunks) if chunk.first <= index < chunk.last)
        old, new = self.chunks[n], self.chunks[n].copy()
        self.chunks[n] = new
        self._summarize(new)
        if (new.use, new.kill) != (old.use, old.kill):
            self.chunks = [chunk if chunk is new else _shared(chunk) for chunk in self.chunks]
            self._live()

    def number(self, reg):
        n = self.numbers.get(reg)
        if n is None:
            n = self.numbers[reg] = len(self.registers)
            self.registers.append(reg)
        return n

    def _mask(self, i):
        """(registers read, registers certainly written) as bits. A guarded instruction keeps what it does not write."""
        reads = sets = 0
        for r in i.uses:
            reads |= 1 << self.number(r)
        for r in i.sets:
            sets |= 1 << self.number(r)
        if i.predicate:
            return reads | sets | 1 << self.number(i.predicate[0]), 0
        return reads, sets

    def names(self, chunk):
        """{name of an instruction: how often it stands in a chunk}"""
        if chunk.names is None:
            chunk.names = Counter(i.name for i in self.instructions[chunk.first:chunk.last])
        return chunk.names

    def param_offset(self, name, i):
        if name not in self.params:
            refuse(i, f"{name} is no parameter")
        return self.params[name]

    # ------------------------------------------------------------------------------------------------------------ flow

    def _cut(self):
        code, labels = self.instructions, self.kernel.body.labels
        starts = {0, *labels.values()}
        for k, i in enumerate(code):
            if i.opcode in CONTROL:
                starts |= {k + 1, k} if i.opcode in ("bar", "barrier") else {k + 1}
            elif i.opcode in WARP_OPERATIONS:
                starts.add(k)
        starts = sorted(s for s in starts if s < len(code))
        cuts = [at for a, b in zip(starts, [*starts[1:], len(code)]) for at in range(a, b, LONGEST)]
        self.chunks = [Chunk(a, b) for a, b in zip(cuts, [*cuts[1:], len(code)])]
        self.chunk_at = {c.first: n for n, c in enumerate(self.chunks)}
        self.chunk_at[len(code)] = len(self.chunks)  # falling off the end
        for n, chunk in enumerate(self.chunks):
            self._end(n, chunk, code[chunk.last - 1])

    def _target(self, i, name):
        if not isinstance(name, Symbol) or name.name not in self.kernel.body.labels:
            refuse(i, f"{getattr(name, 'name', name)} is no label")
        return self.chunk_at[self.kernel.body.labels[name.name]]

    def _end(self, n, chunk, i):
        ahead = (n + 1,)
        chunk.end, chunk.successors = ("next",), ahead
        if i.opcode == "bra":
            if i.modifiers not in ((), ("uni",)) or len(i.operands) != 1:
                refuse(i, "bra{.uni} with one target is taken")
            to = self._target(i, i.operands[0])
            chunk.end = ("bra", to)
            chunk.successors = (to, *ahead) if i.predicate else (to,)
        elif i.opcode == "brx":
            if i.modifiers not in (("idx",), ("idx", "uni")) or len(i.operands) != 2 or i.predicate:
                refuse(i, "brx.idx without a guard is taken")
            names = self.kernel.body.targets.get(i.operands[1].name)
            if names is None:
                refuse(i, f"{i.operands[1].name} lists no targets")
            chunk.successors = tuple(self._target(i, Symbol(name)) for name in names)
            chunk.end = ("brx", chunk.successors)
        elif i.opcode in ("ret", "exit"):
            if i.operands or i.modifiers not in ((), ("uni",)):
                refuse(i, "no operands are taken")
            chunk.end, chunk.successors = ("exit",), ahead if i.predicate else ()
        elif i.opcode == "trap":
            chunk.end, chunk.successors = ("trap",), ahead if i.predicate else ()
        elif i.opcode in ("bar", "barrier"):
            chunk.end = self._barrier(i)

    def _barrier(self, i):
        modifiers = tuple(m for m in i.modifiers if m != "cta")
        if i.predicate:
            refuse(i, "a guard is not taken on a barrier")
        if i.opcode == "bar" and modifiers == ("warp", "sync") and len(i.operands) == 1:
            return ("warp",)
        if modifiers not in (("sync",), ("sync", "aligned")) or not 1 <= len(i.operands) <= 2:
            refuse(i, "bar.sync, barrier.sync{.aligned} and bar.warp.sync are taken")
        if not all(isinstance(o, (Imm, Reg)) for o in i.operands):
            refuse(i, "a number or a register is taken")
        return ("bar", i.opcode == "bar" or "aligned" in modifiers)

    # -------------------------------------------------------------------------------------------------------- liveness

    def _summarize(self, chunk):
        use = kill = 0
        for reads, sets in self.masks[chunk.first:chunk.last]:
            use |= reads & ~kill
            kill |= sets
        chunk.use, chunk.kill = use, kill

    def _live(self):
        chunks = self.chunks
        live = [chunk.live | chunk.use for chunk in chunks] + [0]
        changed = True
        while changed:
            changed = False
            for n in range(len(chunks) - 1, -1, -1):
                chunk, out = chunks[n], 0
                for s in chunk.successors:
                    out |= live[s]
                new = chunk.use | out & ~chunk.kill | chunk.live
                if new != live[n]:
                    live[n], changed = new, True
        for n, chunk in enumerate(chunks):
            out = 0
            for s in chunk.successors:
                out |= live[s]
            if out != chunk.live_out:
                chunk.fast = chunk.checked = None
            chunk.live, chunk.live_out = live[n], out

    # ------------------------------------------------------------------------------------------------------- functions

    def function(self, chunk, checked):
        """The Python function of a chunk, and the instruction of each of its lines."""
        code = self.instructions[chunk.first:chunk.last]
        written = {self.number(r) for i in code for r in i.sets}
        outs = tuple(n for n in sorted(written) if chunk.live_out >> n & 1)
        numbers = tuple(self.number(r) for i in code for r in (*i.sets, *i.uses))
        key = (self.kernel.name, chunk.first, checked, outs, tuple(i.text for i in code), numbers)
        cache = self.kernel.module.chunks
        found = cache.get(key)
        if found is None:
            found = cache[key] = self._compile(chunk, checked, code, outs)
        return found

    def _compile(self, chunk, checked, code, outs):
        e = Emitter(self, self.number, checked)
        inputs = _bits(chunk.use)
        e.at = chunk.first
        for n in inputs:
            reg = self.registers[n]
            e.start(reg)
            e.line(f"r{n}u = G.entry({n})" if checked else f"r{n}u = R[{n}]")
        result = "None"
        for k, i in enumerate(code, chunk.first):
            if i.opcode in CONTROL:
                result = self._control(e, i, k)
            else:
                e.instruction(i, k)
        for n in outs:
            value = e.form(self.registers[n], "u")
            e.line(f"G.leave({n}, {value})" if checked else f"R[{n}] = {value}")
        e.line(f"return {result}")
        source = "def chunk(G, R):\n" + "\n".join(f" {line}" for line in e.lines)
        space = dict(_GLOBALS, **e.constants)
        exec(compile(source, f"<{self.kernel.name}>", "exec"), space)
        return space["chunk"], e.where, source

    def _control(self, e, i, at):
        """The expression that a chunk returns: the guard of a branch, the index of brx, (id, threads) of a barrier."""
        e.i, e.at, e.guard = i, at, None
        if e.checked:
            e.line(f"G.must_have({tuple(self.number(r) for r in (*i.uses, *((i.predicate[0],) if i.predicate else ())))}, None)")
        if i.predicate:
            return f"{'~' if i.predicate[1] else ''}{e.form(i.predicate[0], 'u')}"
        if i.opcode == "brx":
            return e.read(i.operands[0], Type(i, "b32"))
        if i.opcode in ("bar", "barrier"):
            if i.modifiers[:1] == ("warp",):
                e.line(f"G.together({e.read(i.operands[0], Type(i, 'b32'))})")
                return "None"
            return f"({', '.join(e.read(o, Type(i, 'b32')) for o in i.operands)},)"
        return "None"


def _shared(chunk):
    """A copy that keeps the compiled functions."""
    other = chunk.copy()
    other.names, other.fast, other.checked = chunk.names, chunk.fast, chunk.checked
    return other


def _bits(mask):
    out = []
    while mask:
        low = mask & -mask
        out.append(low.bit_length() - 1)
        mask ^= low
    return tuple(out)


def unsupported(module):
    """[(kernel, message)] of the instructions that the executor does not know, in all kernels of a module."""
    found = []
    for name, kernel in module.kernels.items():
        try:
            program = Program(kernel)
        except PtxError as error:
            found.append((name, str(error)))
            continue
        for k, i in enumerate(kernel.instructions):
            if i.opcode in CONTROL:
                continue
            e = Emitter(program, program.number, False)
            for r in (*i.uses, *i.sets, *((i.predicate[0],) if i.predicate else ())):
                e.start(r)
            try:
                e.instruction(i, k)
            except PtxError as error:
                found.append((name, re.sub(r"\s+", " ", str(error))))
    return found
