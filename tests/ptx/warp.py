"""What the threads of a warp do together."""

import numpy as np

from .memory import Fault

u32, u64 = np.uint32, np.uint64
ACCUMULATE = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
              "xor": np.bitwise_xor}


class NotConverged(Exception):
    """An instruction of a whole warp was reached without all the threads that it names. ``ready``: bool by thread."""

    def __init__(self, ready):
        self.ready = ready


class Warp:
    """A group's part that looks across threads; ``lanes``, ``warps``, ``n`` and ``batch`` are the group's."""

    def active_mask(self):
        """By thread, the lanes of its warp that are in this group."""
        lane = self.special("%laneid")
        first = np.flatnonzero(np.concatenate([[True], self.warps[1:] != self.warps[:-1]]))
        masks = np.bitwise_or.reduceat(u32(1) << lane, first).astype(u32)
        return np.repeat(masks, np.diff([*first, self.n]))

    def together(self, mask):
        """The masks (threads,) after making sure that every thread they name, and that has not ended, is here."""
        b = self.batch
        mask = np.broadcast_to(mask, self.n)
        lane = self.special("%laneid")
        if ((mask >> lane) & u32(1) == 0).any():
            raise Fault("a thread that its own mask does not name", int(np.flatnonzero((mask >> lane) & u32(1) == 0)[0]))
        alive = np.zeros((len(b.blocks), b.warps_a_block * 32), bool)
        alive[:, :b.threads] = b.alive.reshape(len(b.blocks), b.threads)
        bits = (alive.reshape(-1, 32).astype(u64) << np.arange(32, dtype=u64)).sum(axis=1, dtype=u64).astype(u32)
        ready = (mask & bits[self.warps] & ~self.active_mask()) == 0
        if not ready.all():
            raise NotConverged(ready)
        return mask

    def _sets(self, mask):
        """Index arrays of the threads of one warp that name the same mask."""
        keys = self.warps.astype(u64) << u64(32) | mask.astype(u64)
        return [np.flatnonzero(keys == key) for key in np.unique(keys)]

    def reduce(self, kind, value, mask):
        mask = self.together(mask)
        value = np.broadcast_to(value, self.n)
        out = np.empty_like(value)
        for seats in self._sets(mask):
            out[seats] = ACCUMULATE[kind].reduce(value[seats], dtype=value.dtype)
        return out

    def vote(self, kind, p, mask):
        mask = self.together(mask)
        p = np.broadcast_to(p, self.n)
        out = np.empty(self.n, u32 if kind == "ballot" else bool)
        bit = np.where(p, u32(1) << self.special("%laneid"), u32(0))
        for seats in self._sets(mask):
            here = p[seats]
            out[seats] = {"all": here.all(), "any": here.any(), "uni": here.all() or not here.any(),
                          "ballot": np.bitwise_or.reduce(bit[seats])}[kind]
        return out

    def shuffle(self, kind, a, b, c, mask):
        """(values, whether the source lay within the segment)."""
        mask = self.together(mask)
        a, b, c = (np.broadcast_to(x, self.n) for x in (a, b, c))
        lane, b = self.special("%laneid").astype(np.int64), (b & u32(31)).astype(np.int64)
        clamp, segment = (c & u32(31)).astype(np.int64), (c >> u32(8) & u32(31)).astype(np.int64)
        top, bottom = lane & segment | clamp & ~segment, lane & segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": bottom | b & ~segment}[kind]
        inside = source >= top if kind == "up" else source <= top
        source = np.where(inside, source, lane)
        table = np.full((int(self.warps[-1]) + 1) * 32, -1, np.int64)
        table[self.warps * 32 + lane] = np.arange(self.n)
        seat = table[self.warps * 32 + source]
        wrong = (seat < 0) | (mask >> source.astype(u32) & u32(1) == 0)
        if wrong.any():
            raise Fault("a shuffle reads a lane that does not take part", int(np.flatnonzero(wrong)[0]))
        return a[seat], inside
