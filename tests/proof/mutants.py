"""Faults to plant: an instruction of a kernel, or a field of a launch's parameters, changed in each way that applies to it.

    of_kernel(kernel)        [Mutant(index, kind, text)], for ``kernel.replaced(index, text)``
    of_parameters(fields)    [(name of the field, what was done, parameter bytes)]
"""

import re
from typing import NamedTuple

from ptx.parse import split

KINDS = ("opcode", "immediate", "predicate", "lane", "rounding")


class Mutant(NamedTuple):
    index: int
    kind: str
    text: str


_CONDITIONS = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "equ": "neu", "neu": "equ",
               "nan": "num", "num": "nan", "ltu": "geu", "geu": "ltu", "gtu": "leu", "leu": "gtu"}
_EDGES = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
_WIDTH = {"8": 1, "16": 2, "32": 4, "64": 8}


def _opcodes(name, operands):
    """Other instructions in the place of one: [(name, operands)]. What has no destination becomes a fence, which does nothing."""
    first, *rest = name.split(".")
    kind = rest[-1] if rest else ""
    float_ = kind == "f32"

    def swap(opcode):
        return [(".".join((opcode, *rest)), operands)]

    if first in ("add", "sub"):
        return swap("sub" if first == "add" else "add")
    if first == "mul":
        if float_:
            return swap("add")
        return [(f"mad.{'.'.join(rest)}", [*operands, "1"])]
    if first in ("fma", "mad"):
        return [(".".join(("mul", *rest)), operands[:3])]
    if first in ("and", "or", "xor"):
        return swap({"and": "or", "or": "and", "xor": "or"}[first])
    if first in ("shl", "shr"):
        return [(f"{'shr.u' if first == 'shl' else 'shl.b'}{kind[1:]}", operands)]
    if first in ("min", "max"):
        return swap("max" if first == "min" else "min")
    if first in ("div", "rem"):
        return swap("rem" if first == "div" else "div")
    if first == "neg":
        return swap("abs")
    if first == "setp":
        found = [(".".join((first, table[rest[0]], *rest[1:])), operands) for table in (_CONDITIONS, _EDGES) if rest[0] in table]
        return found if operands[-1].startswith("%") else found[:1]  # another constant moves the edge as well
    if first == "selp":
        return [(name, [operands[0], operands[2], operands[1], operands[3]])]
    if name == "cvt.rn.f32.u32" or name == "cvt.rn.f32.s32":
        return [(name[:-3] + ("s32" if name.endswith("u32") else "u32"), operands)]
    if first == "cvt" and ".f16x2." in name or ".bf16x2." in name:
        return [(name.replace("bf16x2", "f16x2") if "bf16x2" in name else name.replace("f16x2", "bf16x2"), operands)]
    if first == "cvt" and "f32" in rest and {"f16", "bf16"} & set(rest):
        return [(re.sub(r"\b(b?)f16\b", lambda m: "f16" if m[1] else "bf16", name), operands)]
    if first in ("cvt", "cvta", "sqrt", "bfind", "brev", "activemask", "not", "mov", "bfi", "prmt", "clz", "popc"):
        if operands[0].startswith("{") or len(operands) > 1 and operands[1].startswith("{"):
            return []  # pairs: their lanes are swapped
        if kind == "pred":
            return [("mov.pred" if first == "not" else "not.pred", operands)] if operands[1].startswith("%") else []
        if first == "mov" and not operands[1].startswith("%"):
            return []  # a constant: its value is changed
        if kind == "f32":
            return [("neg.f32", operands[:2])]
        bits = {"cvt": rest[-2][1:], "cvta": "64"}.get(first) if first in ("cvt", "cvta") else kind[1:]
        return [(f"mov.b{bits}", [operands[0], "1"])] if first != "mov" else [(f"not.b{bits}", operands)]
    if first in ("bra", "st", "red", "ret", "bar", "barrier"):
        return [("membar.cta", [])]
    if first in ("atom", "redux"):
        return [(re.sub(r"\b(min|max|or|and|add)\b", lambda m: {"min": "max", "max": "min", "or": "and", "and": "or", "add": "min"}[m[1]], name),
                 operands)]
    if first == "ld":
        width = rest[-1]
        if width[0] == "s" and width != "s64":
            return [(".".join((first, *rest[:-1], "u" + width[1:])), operands)] if width != "s32" else []
        return []
    return []


def _immediates(name, operands):
    """The same instruction with another constant: [operands]. Offsets of addresses move by one element."""
    found = []
    for i, text in enumerate(operands):
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            bits = int(text[2:], 16)
            new = f"0f{bits ^ 1:08X}" if bits << 1 & 0xFFFFFFFF else "0f3F800000"  # one unit in the last place; 1 for 0
        elif re.fullmatch(r"[-+]?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            if name.endswith(".pred"):
                new = "0" if int(text.rstrip("U"), 0) else "1"
            else:
                value = int(text.rstrip("U"), 0)
                new = str(value + 1 if abs(value) < 4096 else value ^ 0x55555555)
        elif text.startswith("[") and name.split(".")[0] in ("ld", "st", "atom", "red"):
            width = _WIDTH[re.search(r"\d+$", name)[0]]
            found_offset = re.fullmatch(r"\[\s*([\w$%]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
            new = f"[{found_offset[1]}+{int(found_offset[2] or '0', 0) + width}]"
        else:
            continue
        found.append([*operands[:i], new, *operands[i + 1 :]])
    return found


def _lanes(name, operands):
    """Registers of a vector or pair exchanged, or the operands of an instruction that tells them apart."""
    found = []
    for i, text in enumerate(operands):
        if text.startswith("{"):
            items = split(text[1:-1])
            for a in range(0, len(items) - 1, 2):
                if items[a] != items[a + 1]:
                    new = [*items[:a], items[a + 1], items[a], *items[a + 2 :]]
                    found.append([*operands[:i], "{" + ", ".join(new) + "}", *operands[i + 1 :]])
    first = name.split(".")[0]
    if first in ("sub", "setp", "shl", "shr", "cvt", "bfi", "prmt", "div", "rem") and len(operands) > 2 and operands[1] != operands[2]:
        if not (first in ("shl", "shr") or name.startswith(("setp.eq", "setp.ne", "setp.nan", "setp.num"))):
            found.append([operands[0], operands[2], operands[1], *operands[3:]])
    if first in ("fma", "mad") and ".wide" not in name and operands[2] != operands[3]:
        found.append([operands[0], operands[1], operands[3], operands[2]])
    return found


def of_kernel(kernel):
    """Every mutant of every instruction."""
    found = []
    for index, one in enumerate(kernel.instructions):
        guard, name, rest = re.fullmatch(r"(@!?\s*\S+\s+)?(\S+)\s*(.*)", one.text).groups()
        guard, operands = (guard or ""), split(rest)

        def put(kind, new_name, new_operands, new_guard=guard):
            text = f"{new_guard}{new_name} {', '.join(new_operands)}".strip()
            if text != one.text:
                found.append(Mutant(index, kind, text))

        for new_name, new_operands in _opcodes(name, operands):
            put("opcode", new_name, new_operands)
        for new_operands in _immediates(name, operands):
            put("immediate", name, new_operands)
        for new_operands in _lanes(name, operands):
            put("lane", name, new_operands)
        if guard:
            put("predicate", name, operands, guard.replace("@!", "@") if "!" in guard else guard.replace("@", "@!"))
            put("predicate", name, operands, "")
        if ".rn." in name:
            put("rounding", name.replace(".rn.", ".rz."), operands)
    return found
