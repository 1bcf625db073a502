"""How many machine instructions a launch takes, without a GPU.

ptxas says of each machine instruction (SASS) which line of the PTX it was made from, and the executor has counted how often
that line ran. A line alone is not enough: instructions are moved between blocks, and what a branch skips in PTX may be
predicated in SASS, where it takes its slot all the same. But the instructions of one basic block run equally often, and as
many threads leave a block as enter it. So the counts of the blocks are the flow through the control-flow graph, from one entry
by every thread to the exits, that is nearest to what the lines say (the sum over instructions of the absolute
difference is least): profile inference, as compilers make it from samples of a running program (He, Mestre, Pupyrev, Wang, Yu,
"Profile inference revisited", POPL 2022). ``Executed.agreeing`` is the share of instructions whose line ran exactly as often as
their block. Subroutines of ptxas come from no line: they run as often as they are called.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

_LINE = re.compile(r'//## File "\.nv_debug_ptx_txt", line (\d+)')
_CODE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\S+):$")


class Instruction(NamedTuple):
    line: int  # of the PTX, 0 where unknown
    guard: str | None
    opcode: str
    operands: str

    @property
    def kind(self):
        return self.opcode.split(".")[0]

    @property
    def target(self):
        found = re.search(r"`\(([^)]*)\)", self.operands)
        return found[1] if found else None

    @property
    def double(self):
        """A multiplication of integers to more than 32 bits: 64 results a clock on a multiprocessor that issues 128."""
        return self.opcode.startswith(("IMAD.WIDE", "IMAD.HI"))


class Executed(NamedTuple):
    """Counts by threads: all instructions; those that take two cycles; the share whose line agrees with its block."""

    instructions: float
    double: float
    agreeing: float


def tool(name, *arguments):
    """What a tool that comes with Triton prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def read(cubin):
    """{kernel: [label or Instruction]} of a cubin (bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        text = tool("nvdisasm", "-c", "-gp", path)
    kernels, body, line = {}, [], 0
    for row in text.splitlines():
        row = row.strip()
        if re.match(r"\.section\s", row):
            found = re.match(r"\.section\s+\.text\.([\w$]+)", row)
            body, line = kernels.setdefault(found[1], []) if found else [], 0
        elif found := _LINE.search(row):
            line = int(found[1])
        elif found := _CODE.match(row):
            body.append(Instruction(line, found[2], found[3], found[4]))
        elif found := _LABEL.match(row):
            body.append(found[1])
    return {name: body for name, body in kernels.items() if body}


def resources(cubin):
    """{kernel: {"REG", "STACK", "SHARED", "LOCAL": number}} of a cubin (bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        text = tool("cuobjdump", "--dump-resource-usage", path)
    return {name: {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
            for name, usage in re.findall(r"Function ([\w$]+):\s*\n\s*(.*)", text)}


def spills(body):
    """Accesses to local memory."""
    return sum(isinstance(i, Instruction) and i.kind in ("LDL", "STL") for i in body)


class Graph:
    """The basic blocks of a kernel and the edges between them, the exit being the number of blocks."""

    def __init__(self, body):
        self.blocks, labels, open_ = [], {}, False
        for item in body:
            if isinstance(item, str):
                labels[item], open_ = len(self.blocks), False
                continue
            if not open_:
                self.blocks.append([])
                open_ = True
            self.blocks[-1].append(item)
            open_ = item.kind not in ("BRA", "EXIT", "RET", "CALL", "BRX", "JMP", "JMX", "BREAK", "KILL")
        self.edges, calls, returns = set(), {}, {}
        for n, block in enumerate(self.blocks):
            last = block[-1]
            always = last.guard in (None, "PT", "!UPT")
            if last.kind in ("BRX", "JMP", "JMX", "KILL") or last.kind in ("BRA", "CALL") and last.target not in labels:
                raise ValueError(f"{last.opcode} {last.operands}: where it leads is not known")
            if last.kind == "BRA":
                self.edges.add((n, labels[last.target]))
                plain = re.fullmatch(r"`\([^)]*\)", last.operands) and last.opcode in ("BRA", "BRA.U")
                always = always and bool(plain)
            elif last.kind == "EXIT":
                self.edges.add((n, len(self.blocks)))
            elif last.kind == "CALL":
                calls.setdefault(labels[last.target], []).append(n + 1)
                self.edges.add((n, labels[last.target]))
            elif last.kind == "RET":
                returns[n] = None
            else:
                always = False
            if not always and n + 1 < len(self.blocks):
                self.edges.add((n, n + 1))
        entries = sorted(calls)
        self.own = entries[0] if entries else len(self.blocks)  # behind them stand subroutines of ptxas (division of int64)
        for n in returns:  # of the subroutine that begins last before it
            entry = max(e for e in entries if e <= n)
            self.edges.update((n, after) for after in calls[entry])

    def reachable(self):
        """The blocks that a thread can come to: what follows the last EXIT fills the cache line."""
        seen, ahead = set(), [0]
        while ahead:
            n = ahead.pop()
            if n not in seen and n < len(self.blocks):
                seen.add(n)
                ahead += [b for a, b in self.edges if a == n]
        return sorted(seen)


def flow(graph, counts, threads):
    """{block: executions by threads} nearest to the counts of the lines. counts: {line of the PTX: executions}"""
    blocks = graph.reachable()
    edges = sorted((a, b) for a, b in graph.edges if a in blocks)
    votes = [(n, count, times) for n in blocks if n < graph.own for count, times in
             Counter(counts[i.line] for i in graph.blocks[n] if i.line in counts).items()]
    into, at = {n: [] for n in blocks}, {n: [] for n in blocks}
    for k, (a, b) in enumerate(edges):
        at[a].append(k)
        if b in into:
            into[b].append(k)
    columns = len(edges) + len(votes)
    rows, where, values, bounds = [], [], [], []

    def constraint(terms, bound, into_):
        for column, value in terms:
            rows.append(len(into_))
            where.append(column)
            values.append(value)
        into_.append(bound)

    for n in blocks:  # what enters leaves
        constraint([*((k, 1.0) for k in at[n]), *((k, -1.0) for k in into[n])], float(n == 0), bounds)
    balance = coo_matrix((values, (rows, where)), (len(bounds), columns))
    rows, where, values, limits = [], [], [], []
    for v, (n, count, _) in enumerate(votes):  # distance >= |count of the block - count of the line|
        for sign in (1.0, -1.0):
            constraint([*((k, sign) for k in at[n]), (len(edges) + v, -1.0)], sign * count / threads, limits)
    distance = coo_matrix((values, (rows, where)), (len(limits), columns))
    # Without a vote an edge is not taken: the price is too small to outweigh one.
    price = np.concatenate([np.full(len(edges), 1e-6), [float(times) for *_, times in votes]])
    found = linprog(price, A_ub=distance.tocsr(), b_ub=limits, A_eq=balance.tocsr(), b_eq=bounds, method="highs")
    assert found.success, found.message
    return {n: float(sum(found.x[k] for k in at[n])) * threads for n in blocks}


def executed(body, lines, threads):
    """``Executed`` of a kernel's body. lines: {line of the PTX: executions by threads}; threads: that entered the kernel."""
    graph = Graph(body)
    times = flow(graph, lines, threads)
    every = double = agree = known = 0.0
    for n, count in times.items():
        for i in graph.blocks[n]:
            if i.kind == "NOP":
                continue
            every += count
            double += count * i.double
            if n < graph.own and i.line in lines and (count or lines[i.line]):
                known += 1
                agree += abs(lines[i.line] - count) < 0.5
    return Executed(every, double, agree / known)


def by_line(kernel, counts):
    """{line of the PTX: executions by threads} of a launch."""
    lines = {}
    for index, instruction in enumerate(kernel.instructions):
        lines[instruction.line] = max(lines.get(instruction.line, 0), counts.by_index[index])
    return lines
