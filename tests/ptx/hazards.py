"""What a kernel may not rely on: bytes that were never written, and warps that no barrier puts in order.

Every warp of a block has a clock, and knows of each other warp the time up to which a barrier has put that one's accesses
before its own. A shared granule keeps, by warp, the time of the last write, read and atomic operation (FastTrack, Flanagan and
Freund 2009, with whole rows where it keeps one epoch). Two accesses are in order where the later one's warp knows the time of
the other. A barrier gives all warps that it holds what any of them knows, and their clocks go on.

The lanes of a warp are not told apart: they run in lockstep here, and what bar.warp.sync and shfl.sync order is not looked at.
"""

import numpy as np

from .memory import UNSIGNED, Dense, Fault
from .syntax import SIZES

KINDS = {"ld": "read", "st": "written", "atom": "changed"}
AGAINST = {"ld": ("st", "atom"), "st": ("st", "atom", "ld"), "atom": ("st", "ld")}  # atomics are in no need of an order
_WHOLE = {size: UNSIGNED[size](0x0101010101010101 & (1 << 8 * size) - 1) for size in UNSIGNED}


class Written:
    """Which bytes of a state space were written."""

    def __init__(self, size):
        self.marks = Dense(np.zeros(size, np.uint8), 0, "")

    def store(self, physical, size, count):
        self.marks.scatter(physical, _WHOLE[size], size, count)

    def load(self, space, addresses, physical, size, count):
        """Raises Fault for bytes that nobody wrote. addresses: those that the threads gave."""
        missing = self.marks.gather(physical, size, count) != _WHOLE[size]
        if missing.any():
            lane = int(np.flatnonzero(missing.any(axis=-1) if count > 1 else missing)[0])
            address = int(np.atleast_1d(addresses)[lane if addresses.ndim else 0])
            raise Fault(f"{size * count} bytes at {space} address {address:#x} are read, of which some were never written", lane)


class Races:
    """The accesses to the shared memory of several blocks. warps: those of one block; stride: bytes of one block."""

    def __init__(self, kernel, blocks, warps, stride):
        self.kernel, self.warps, self.stride = kernel, warps, stride
        self.granule = min(4, *(SIZES.get(i.modifiers[-1], 4) for i in kernel.instructions if _may_be_shared(i)), 4)
        self.clocks = np.zeros((blocks * warps, warps), np.int32)
        self._tick(np.arange(blocks * warps))
        shape = blocks * stride // self.granule, warps
        self.times = {what: np.zeros(shape, np.int32) for what in KINDS}
        self.places = {what: np.zeros(shape, np.int32) for what in KINDS}  # the instructions that did it

    def _tick(self, rows):
        self.clocks[rows, rows % self.warps] += 1

    def barrier(self, rows):
        """These warps (rising) have waited for each other, those of one block."""
        blocks = rows // self.warps
        first = np.flatnonzero(np.concatenate([[True], blocks[1:] != blocks[:-1]]))
        known = np.maximum.reduceat(self.clocks[rows], first)
        self.clocks[rows] = np.repeat(known, np.diff([*first, len(rows)]), axis=0)
        self._tick(rows)

    def access(self, what, at, physical, warps, width):
        """Raises Fault for an access that no barrier puts behind another warp's. warps: by thread."""
        each = max(1, width // self.granule)
        granules = np.broadcast_to((physical // np.uint64(self.granule)).astype(np.int64), len(warps))
        granules = (granules[:, None] + np.arange(each)).ravel()
        rows = np.repeat(warps, each)
        own = rows % self.warps
        self.times[what][granules, own] = self.clocks[rows, own]
        self.places[what][granules, own] = at
        known = self.clocks[rows]
        for other in AGAINST[what]:
            unknown = self.times[other][granules] > known
            if unknown.any():
                n, warp = (int(k) for k in np.argwhere(unknown)[0])
                line = self.kernel.instructions[self.places[other][granules[n], warp]].line
                address = int(granules[n]) * self.granule % self.stride
                earlier = f"was {KINDS[other]} by warp {warp} at line {line}"
                raise Fault(f"shared address {address:#x} is {KINDS[what]} by warp {int(own[n])} and {earlier}: "
                            "no barrier stands between", n // each)


def _may_be_shared(i):
    """Whether an instruction reaches shared memory, by name or by a generic address."""
    return i.opcode in ("ld", "st", "atom", "red") and not {"global", "param", "const", "local"} & set(i.modifiers)


def rising(addresses):
    return addresses.ndim == 1 and bool((addresses[1:] > addresses[:-1]).all())


def loser(values, kept):
    """The first thread whose value is not the one that memory kept, or None. Both: (threads,) or (threads, elements)."""
    other = values != kept
    if not other.any():
        return None
    return int(np.flatnonzero(other.any(axis=-1) if other.ndim > 1 else other)[0])
