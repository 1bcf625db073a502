"""PTX modules and their kernels."""

import copy
import functools
import re
from dataclasses import dataclass, field

from .syntax import SIZES, Body, PtxError, fail, instruction, split, variable


class Kernel:
    """An entry. Its body is parsed when it is first looked at."""

    def __init__(self, name, header, body, header_line, body_line, module):
        self.name, self.module = name, module
        self._text, self._body_line = body, body_line
        self.params, self.param_bytes = self._params(header, header_line)
        self.reqntid, self.maxntid = self._threads(header, "reqntid"), self._threads(header, "maxntid")
        rest = re.sub(r"\.(reqntid|maxntid|minnctapersm|maxnreg|maxclusterrank)\s+[\d,\s]+|\.(noreturn)\b", " ",
                      header[header.rindex(")") + 1:] if ")" in header else "")
        if rest.strip():
            fail(header_line, rest, "this directive is not known")

    @staticmethod
    def _threads(header, which):
        match = re.search(rf"\.{which}\s+([\d,\s]+)", header)
        return None if not match else tuple((*(int(n) for n in match[1].split(",")), 1, 1)[:3])

    def _params(self, header, line):
        inside = header[header.index("(") + 1:header.rindex(")")] if "(" in header else ""
        params, at = [], 0
        for text in split(inside):
            match = re.fullmatch(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.(?:global|shared|const|local)\s+)?"
                                 r"(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?", text)
            if not match or match[2] not in SIZES:
                fail(line, text, "this parameter is not understood")
            unit = SIZES[match[2]]
            align = int(match[1] or unit)
            at = -(-at // align) * align
            params.append((match[3], at, unit * int(match[4] or 1), align))
            at += params[-1][2]
        return params, at

    @functools.cached_property
    def body(self):
        return Body(self._text, self._body_line)

    @functools.cached_property
    def instructions(self):
        return tuple(self.body.instructions)

    @functools.cached_property
    def layout(self):
        """{variable: (space, offset)} of shared and local memory, static shared bytes, local bytes."""
        offsets, sizes = {}, {"shared": 0, "local": 0}
        dynamic = [v for v in self.module.variables if v.space == "shared" and v.external]
        for v in [*(v for v in self.module.variables if v.space == "shared" and not v.external), *self.body.variables]:
            at = -(-sizes[v.space] // v.align) * v.align
            offsets[v.name] = (v.space, at)
            sizes[v.space] = at + v.size
        for v in dynamic:
            sizes["shared"] = -(-sizes["shared"] // v.align) * v.align
        for v in dynamic:
            offsets[v.name] = ("shared", sizes["shared"])
        return offsets, sizes["shared"], sizes["local"]

    @property
    def shared_bytes(self):
        return self.layout[1]

    @property
    def local_bytes(self):
        return self.layout[2]

    def replaced(self, index, text):
        """A kernel that differs from this one in the instruction ``index`` and shares everything else."""
        old = self.instructions[index]
        new = instruction(text.strip().rstrip(";"), old.line, self.body.registers, old.scope)
        other = copy.copy(self)
        other.__dict__["instructions"] = (*self.instructions[:index], new, *self.instructions[index + 1:])
        from .flow import Program

        other.__dict__["program"] = Program(other, self.program, index)
        return other

    @functools.cached_property
    def program(self):
        from .flow import Program

        return Program(self)

    def __repr__(self):
        return f"Kernel({self.name}, {len(self.instructions)} instructions)"


@dataclass
class Module:
    version: str
    target: str
    kernels: dict
    variables: list
    chunks: dict = field(default_factory=dict, repr=False)  # compiled code, shared by kernels that differ in one instruction


def _closing(text, at):
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("a brace is not closed")


def parse(text):
    """A module. Raises ``PtxError`` for what it does not know; bodies of kernels are read when first looked at."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    module = Module("", "", {}, [])
    token = re.compile(r"\s+|\.version\s+(?P<version>\S+)|\.target\s+(?P<target>[^\n]+)|\.address_size\s+(?P<bits>\d+)"
                       r"|\.file\b[^\n]*|\.section\s+\S+\s*(?P<section>\{)"
                       r"|(?:\.visible\s+|\.weak\s+)?\.entry\s+(?P<entry>[\w$]+)(?P<header>[^{]*)\{"
                       r"|(?P<variable>[^;{]*(?:=\s*\{[^}]*\})?[^;{]*);")
    at = 0
    while at < len(text):
        match = token.match(text, at)
        line = text.count("\n", 0, at) + 1
        if not match:
            fail(line, text[at:at + 60].split("\n")[0], "this is not understood at the module's level")
        at = match.end()
        if match["version"]:
            module.version = match["version"]
        elif match["target"]:
            module.target = match["target"].strip()
        elif match["bits"] and match["bits"] != "64":
            fail(line, match[0], "only 64-bit addresses are taken")
        elif match["section"]:
            at = _closing(text, match.start("section")) + 1
        elif match["entry"]:
            end = _closing(text, match.end() - 1)
            name = match["entry"]
            body_line = text.count("\n", 0, match.end()) + 1
            module.kernels[name] = Kernel(name, match["header"], text[match.end():end], line, body_line, module)
            at = end + 1
        elif match["variable"]:
            module.variables.append(variable(match["variable"], line))
    return module
