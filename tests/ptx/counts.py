"""What a launch did."""

from collections import Counter

import numpy as np

_FIELDS = {"instructions": Counter, "issued": Counter, "loaded": Counter, "stored": Counter, "sectors_loaded": Counter,
           "sectors_stored": Counter, "widths": Counter, "requests": Counter, "by_index": Counter, "divergent_branches": int,
           "barriers": int, "threads": int, "steps": int}
_KEPT = 1 << 22  # addresses that wait to be counted


class Counts:
    """Counts of one launch; ``+`` adds those of several.

    instructions  {name: executions by threads}; a thread whose guard is false counts, since the slot is spent
    issued        {name: executions by warps, with at least one thread}
    loaded, stored  {state space: bytes asked for by threads}; atomics count in both
    sectors_loaded, sectors_stored  {"global": 32-byte sectors touched, summed over warp accesses}
    widths        {("ld" | "st" | "atom", space, bytes): accesses by threads}
    requests      {("ld" | "st" | "atom", space): accesses by warps}
    by_index      {index in the kernel's instructions: executions by threads}
    divergent_branches  executions of a branch that split a warp;  barriers: releases of a block;  threads: that were run
    steps         instructions that groups of threads took, what ``run(..., steps=)`` limits; of several batches the most

    They are made when they are first asked for: who wants only the results of a launch does not wait for them.
    """

    def __init__(self):
        self._made = {name: kind() for name, kind in _FIELDS.items()}
        self._chunks, self._accesses, self._waiting = [], [], 0

    def __getattr__(self, name):
        if name not in _FIELDS:
            raise AttributeError(name)
        self._settle()
        return self._made[name]

    def bump(self, name, by, key=None):
        if key is None:
            self._made[name] += by
        else:
            self._made[name][key] += by

    def took(self, steps):
        self._made["steps"] = max(self._made["steps"], steps)

    def add_chunk(self, names, first, last, threads, warps):
        """names: {name: how often} of the instructions [first, last), which so many threads and warps ran."""
        self._chunks.append((names, first, last, threads, warps))

    def add_access(self, what, space, width, addresses, warps):
        """One instruction's accesses: addresses of the threads (or one for all), and the warp of each."""
        self._accesses.append((what, space, width, addresses, warps))
        self._waiting += len(warps)
        if self._waiting > _KEPT:
            self._settle()

    def _settle(self):
        chunks, accesses, self._chunks, self._accesses, self._waiting = self._chunks, self._accesses, [], [], 0
        instructions, issued = self._made["instructions"], self._made["issued"]
        for names, first, last, threads, warps in chunks:
            for index in range(first, last):
                self._made["by_index"][index] += threads
            for name, times in names.items():
                instructions[name] += times * threads
                issued[name] += times * warps
        for access in accesses:
            self._access(*access)

    def _access(self, what, space, width, addresses, warps):
        threads, made = len(warps), self._made
        if threads == 0:
            return
        made["widths"][what, space, width] += threads
        distinct = _distinct(warps)
        made["requests"][what, space] += distinct
        for other, bytes_, sectors in (("st", "loaded", "sectors_loaded"), ("ld", "stored", "sectors_stored")):
            if what != other:
                made[bytes_][space] += threads * width
                if space == "global":
                    made[sectors][space] += _sectors(addresses, warps, distinct)

    @property
    def total(self):
        """Instructions executed by threads."""
        return sum(self.instructions.values())

    @property
    def total_issued(self):
        return sum(self.issued.values())

    def __add__(self, other):
        out = Counts()
        out._made = {name: getattr(self, name) + getattr(other, name) for name in _FIELDS}
        return out

    def __repr__(self):
        return "Counts(" + ", ".join(f"{name}={getattr(self, name)}" for name in _FIELDS) + ")"


def _distinct(sorted_values):
    return 1 + int(np.count_nonzero(sorted_values[1:] != sorted_values[:-1]))


def _sectors(addresses, warps, distinct):
    """An access is aligned to its width and no wider than a sector: it touches one."""
    if addresses.ndim == 0:
        return distinct
    sectors = addresses >> np.uint64(5)
    change = (sectors[1:] != sectors[:-1]) | (warps[1:] != warps[:-1])
    falls = (sectors[1:] < sectors[:-1]) & (warps[1:] == warps[:-1])
    if not falls.any():
        return 1 + int(np.count_nonzero(change))
    order = np.lexsort((sectors, warps))
    s, w = sectors[order], warps[order]
    return 1 + int(np.count_nonzero((s[1:] != s[:-1]) | (w[1:] != w[:-1])))
