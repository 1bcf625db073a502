"""The threads of a batch of blocks that stand at one place, and what the instructions ask of them."""

from collections import defaultdict

import numpy as np

from .hazards import Races, Written, loser, rising
from .memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, UNSIGNED, Dense, Fault
from .warp import ACCUMULATE, Warp

u32, u64 = np.uint32, np.uint64
_WINDOWS = {1: ("shared", SHARED_WINDOW), 2: ("local", LOCAL_WINDOW), 3: ("param", PARAM_WINDOW)}


class Batch:
    """What the threads of several blocks share: geometry, parameters, memory, counts."""

    def __init__(self, kernel, grid, block, blocks, params, memory, shared, counts):
        self.kernel, self.grid, self.block, self.memory, self.counts = kernel, grid, block, memory, counts
        self.blocks, self.threads = np.asarray(blocks, np.int64), block[0] * block[1] * block[2]
        self.total = len(self.blocks) * self.threads
        self.warps_a_block = -(-self.threads // 32)
        self.alive = np.ones(self.total, bool)
        padded = np.zeros(-(-max(len(params), 1) // 16) * 16, np.uint8)
        padded[:len(params)] = np.frombuffer(params, np.uint8)
        self.params = Dense(padded[:kernel.param_bytes], 0, "the parameters")
        self.parameters = {size: padded.view(UNSIGNED[size]) for size in UNSIGNED}
        self.parameter_reads = 0
        self.sites = defaultdict(lambda: [None])
        self.origins = {}  # register: the one it was made from that was never written
        self.windows = {"shared": self._window(kernel.shared_bytes + shared, len(self.blocks)),
                        "local": self._window(kernel.local_bytes, self.total)}
        self.written = {space: Written(place.size) for space, (_, _, place) in self.windows.items()}
        size, stride, _ = self.windows["shared"]
        races = size and self.warps_a_block > 1
        self.races = Races(kernel, len(self.blocks), self.warps_a_block, stride) if races else None
        self.globals = memory.module(kernel.module)

    @staticmethod
    def _window(size, slots):
        stride = -(-size // 64) * 64
        return size, stride, Dense(np.zeros(stride * slots, np.uint8), 0, "")

    def thread(self, lane):
        """What a thread is called, for people."""
        block, thread = divmod(int(lane), self.threads)
        number = int(self.blocks[block])
        thread, number = ((n % x, n // x % y, n // (x * y)) for n, (x, y, _) in ((thread, self.block), (number, self.grid)))
        return f"thread {thread} of block {number}"

    def addresses_of(self, name):
        layout = self.kernel.layout[0]
        if name in layout:
            return layout[name][1]
        if name in self.globals:
            return self.globals[name]
        offset = next((offset for param, offset, _, _ in self.kernel.params if param == name), None)
        if offset is None:
            raise Fault(f"the variable {name} is not known")
        return offset


class Group(Warp):
    def __init__(self, batch, lanes, chunk, registers, partial):
        self.batch, self.lanes, self.chunk, self.R, self.partial = batch, lanes, chunk, registers, partial
        self.n = len(lanes)
        self.parameters = batch.parameters
        self._warps = self._specials = self._warp_count = None
        self.valid = {}

    # ------------------------------------------------------------------------------------------------------- geometry

    @property
    def warps(self):
        """The number of each thread's warp, rising."""
        if self._warps is None:
            b = self.batch
            block, thread = np.divmod(self.lanes, b.threads)
            self._warps = block * b.warps_a_block + thread // 32
        return self._warps

    @property
    def warp_count(self):
        if self._warp_count is None:
            w = self.warps
            self._warp_count = 1 + int(np.count_nonzero(w[1:] != w[:-1])) if self.n else 0
        return self._warp_count

    def special(self, name):
        if self._specials is None:
            self._specials = {}
        found = self._specials.get(name)
        if found is None:
            found = self._specials[name] = self._special(name)
        return found

    def _special(self, name):
        b = self.batch
        what, _, axis = name[1:].partition(".")
        axis = "xyz".index(axis) if axis else 0
        if what == "ntid":
            return u32(b.block[axis])
        if what == "nctaid":
            return u32(b.grid[axis])
        if what == "nwarpid":
            return u32(b.warps_a_block)
        block, thread = np.divmod(self.lanes, b.threads)
        if what in ("tid", "ctaid"):
            number, extent = (thread, b.block) if what == "tid" else (b.blocks[block], b.grid)
            if extent[axis] == 1:
                return u32(0)
            if what == "ctaid" and len(b.blocks) == 1:
                number = b.blocks[0]
            for k in range(axis):
                number = number // extent[k]
            return (number % extent[axis]).astype(u32)
        lane = (thread % 32).astype(u32)
        bit = u32(1) << lane
        below, upto = bit - u32(1), (bit << u32(1)) - u32(1)
        return {"laneid": lane, "warpid": (thread // 32).astype(u32), "lanemask_eq": bit, "lanemask_lt": below, "lanemask_le": upto,
                "lanemask_gt": ~upto, "lanemask_ge": ~below}[what]

    def address(self, name, dtype):
        return dtype(self.batch.addresses_of(name))

    def count_param(self, width):
        self.batch.parameter_reads += width * self.n

    # ------------------------------------------------------------------------------------- registers, in checked chunks

    def entry(self, n):
        """A register's value where it has one; its validity is kept beside it."""
        if n in self.R:
            self.valid[n] = True
            return self.R[n]
        value, valid = self.partial.get(n, (None, False))
        self.valid[n] = valid
        reg = self.batch.kernel.program.registers[n]
        zero = np.bool_(False) if reg.type == "pred" else UNSIGNED[int(reg.type[1:]) // 8](0)
        return zero if value is None else value

    def leave(self, n, value):
        valid = self.valid[n]
        if valid is True or valid is not False and valid.all():
            self.R[n] = value
            self.partial.pop(n, None)
        else:
            self.R.pop(n, None)
            self.partial[n] = (value, valid)

    def has(self, n, half=None):
        """Where a register, or one half of a pair, has a value; None is an immediate."""
        valid = np.asarray(True if n is None else self.valid.get(n, False))
        if valid.ndim == 2:  # (threads, halves)
            valid = valid.all(axis=1) if half is None else valid[:, half]
        return valid[()]

    def written(self, n, guard, sources, chosen=True):
        """A register now has a value where the guard holds and all that it was made of, (register, half or None), had one."""
        new = chosen
        for source, half in sources:
            new = new & self.has(source, half)
        if not np.all(new):
            self.batch.origins.setdefault(n, next((s for s, half in sources if not np.all(self.has(s, half))), None))
        if guard is not None:
            new = np.where(guard, new, self.has(n))[()]
        self.valid[n] = bool(new) if np.ndim(new) == 0 else new

    def written_halves(self, n, guard, low, high):
        """``written`` of a pair, each half of which is made of its own."""
        before, halves = [self.has(n, half) for half in (0, 1)], []
        for sources, old in zip((low, high), before):
            self.valid[n] = old
            self.written(n, guard, sources)
            halves.append(np.broadcast_to(self.valid[n], self.n))
        self.valid[n] = True if all(half.all() for half in halves) else np.stack(halves, axis=1)

    def must_have(self, numbers, guard):
        """Raises Fault if one of these registers, on which something depends, was never written."""
        for n in numbers:
            if self.valid.get(n, False) is True:
                continue
            missing = np.broadcast_to(np.logical_not(self.has(n)), self.n)
            if guard is not None:
                missing = missing & guard
            if missing.any():
                raise Fault(self._history(n), int(np.flatnonzero(missing)[0]))

    def _history(self, n):
        program, seen = self.batch.kernel.program, []
        while n is not None and n not in seen:
            seen.append(n)
            n = self.batch.origins.get(n)
        names = [program.registers[k].name for k in seen]
        text = f"the register {names[0]} is read before it is written"
        return text if len(names) == 1 else f"{text}: it was made from {', that from '.join(names[1:])}, which was not"

    # ----------------------------------------------------------------------------------------------------------- memory

    def _which(self, guard):
        """Threads that take part, None for all."""
        if guard is None:
            return None
        if guard.ndim == 0:
            return None if guard else np.empty(0, np.int64)
        which = np.flatnonzero(guard)
        return None if len(which) == self.n else which

    def _place(self, space, addresses, which, total):
        """(Dense, physical addresses) of shared, local or parameter memory."""
        if space == "param":
            size, base, place = self.batch.kernel.param_bytes, None, self.batch.params
        else:
            size, stride, place = self.batch.windows[space]
            slot = self.lanes if space == "local" else self.lanes // self.batch.threads
            slot = slot if which is None else slot[which]
            base = slot.view(u64) * u64(stride) if space == "local" or len(self.batch.blocks) > 1 else None
        flat = np.atleast_1d(addresses)
        bad = (flat > u64(max(size - total, 0))) if size >= total else np.ones(len(flat), bool)
        if bad.any():
            lane = int(np.flatnonzero(bad)[0])
            raise Fault(f"out of bounds: {total} bytes at {space} address {int(flat[lane]):#x} of {size} bytes", lane)
        bad = flat & u64(total - 1) != 0
        if bad.any():
            lane = int(np.flatnonzero(bad)[0])
            raise Fault(f"misaligned: {total} bytes at {space} address {int(flat[lane]):#x}", lane)
        return place, addresses if base is None else addresses + base

    def _route(self, space, addresses, which, total):
        """[(state space, addresses, positions or None)]: generic addresses name their state space in their upper bits."""
        if space:
            return [(space, addresses, None)]
        top = addresses >> u64(56)
        if not top.any():
            return [("global", addresses, None)]
        addresses, top = (np.atleast_1d(x) for x in (addresses, top))
        if len(addresses) == 1:
            n = self.n if which is None else len(which)
            addresses, top = np.repeat(addresses, n), np.repeat(top, n)
        parts = []
        for t in np.unique(top):
            at = np.flatnonzero(top == t)
            name, base = _WINDOWS.get(int(t), ("global", 0))
            parts.append((name, addresses[at] - u64(base), at))
        return parts

    def _fetch(self, at, space, addresses, which, size, count):
        if space in ("global", "const"):
            return self.batch.memory.load(self.batch.sites[at], addresses, size, count)
        place, physical = self._place(space, addresses, which, size * count)
        if space != "param":
            self.batch.written[space].load(space, addresses, physical, size, count)
            self._race("ld", at, space, physical, which, size * count)
        return place.gather(physical, size, count)

    def _race(self, what, at, space, physical, which, width):
        races = self.batch.races
        if space == "shared" and races is not None:
            races.access(what, at, physical, self.warps if which is None else self.warps[which], width)

    def _agreed(self, space, addresses, physical, values, kept, whom):
        """Raises Fault if memory kept another value than one that a thread stored: another thread's."""
        lane = loser(values, kept)
        if lane is not None:
            winner = int(np.flatnonzero(physical == physical[lane])[-1])
            winner = winner if whom is None else whom[winner]
            other = self.batch.thread(self.lanes[winner])
            raise Fault(f"{space} address {int(addresses[lane]):#x} is given another value by {other} in the same instruction", lane)

    def _log(self, what, space, width, addresses, which):
        warps = self.warps if which is None else self.warps[which]
        self.batch.counts.add_access(what, space, width, addresses, warps)

    def load(self, at, space, addresses, size, count, guard):
        """(threads,) for one element, (count, threads) for a vector; without the last axis where all share one address."""
        which = self._which(guard)
        if which is not None:
            if len(which) == 0:
                return np.zeros(count, UNSIGNED[size]) if count > 1 else UNSIGNED[size](0)
            if addresses.ndim:
                addresses = addresses[which]
        whom = which
        try:
            parts = self._route(space, addresses, which, size * count)
            if parts[0][2] is None:
                space = parts[0][0]
                rows = self._fetch(at, space, parts[0][1], which, size, count)
                self._log("ld", space, size * count, parts[0][1], which)
            else:
                n = self.n if which is None else len(which)
                rows = np.empty((n, count) if count > 1 else n, UNSIGNED[size])
                for name, there, positions in parts:
                    whom = positions if which is None else which[positions]
                    rows[positions] = self._fetch(at, name, there, whom, size, count)
                    self._log("ld", name, size * count, there, whom)
        except Fault as fault:
            fault.lane = fault.lane if whom is None else int(whom[fault.lane])
            raise
        if which is not None:
            full = np.zeros((self.n, count) if count > 1 else self.n, UNSIGNED[size])
            full[which] = rows
            rows = full
        return np.ascontiguousarray(rows.T) if count > 1 else rows

    def store(self, at, space, addresses, values, size, guard):
        which = self._which(guard)
        count = len(values)
        if which is not None:
            if len(which) == 0:
                return
            addresses = addresses[which] if addresses.ndim else addresses
            values = tuple(v[which] if v.ndim else v for v in values)
        n = self.n if which is None else len(which)
        if count > 1:
            rows = np.empty((n, count), UNSIGNED[size])
            for k, v in enumerate(values):
                rows[:, k] = v
        else:
            rows = values[0]
        if addresses.ndim == 0 and rows.ndim:  # all threads write one place
            addresses = np.broadcast_to(addresses, n)
        whom = which
        try:
            for name, there, positions in self._route(space, addresses, which, size * count):
                whom = which if positions is None else positions if which is None else which[positions]
                part = rows if positions is None or not rows.ndim else rows[positions]
                if name in ("param", "const"):
                    raise Fault(f"a store to the state space {name}")
                if name == "global":
                    site = self.batch.sites[at]
                    self.batch.memory.store(site, there, part, size, count)
                    if part.ndim and not rising(there):
                        self._agreed(name, there, there, part, self.batch.memory.load(site, there, size, count), whom)
                else:
                    place, physical = self._place(name, there, whom, size * count)
                    place.scatter(physical, part, size, count)
                    self.batch.written[name].store(physical, size, count)
                    if part.ndim and not rising(physical):
                        self._agreed(name, there, physical, part, place.gather(physical, size, count), whom)
                    self._race("st", at, name, physical, whom, size * count)
                self._log("st", name, size * count, there, whom)
        except Fault as fault:
            fault.lane = fault.lane if whom is None else int(whom[fault.lane])
            raise

    def atomic(self, at, space, addresses, kind, values, size, guard):
        """The values before, thread by thread in rising order."""
        which = self._which(guard)
        n = self.n if which is None else len(which)
        dtype = values[0].dtype
        if n == 0:
            return dtype.type(0)
        pick = (lambda v: np.broadcast_to(v, self.n)) if which is None else (lambda v: np.broadcast_to(v, self.n)[which])
        addresses, values = pick(addresses), [pick(v) for v in values]
        old, whom = np.empty(n, dtype), which
        try:
            for name, there, positions in self._route(space, addresses, which, size):
                if name not in ("global", "shared"):
                    raise Fault(f"an atomic operation on the state space {name}")
                mine = np.arange(n) if positions is None else positions
                whom = mine if which is None else which[mine]
                if name == "global":
                    self.batch.memory._check(there, size, True)
                    place, physical = None, there
                else:
                    place, physical = self._place(name, there, whom, size)
                    self.batch.written[name].load(name, there, physical, size, 1)
                    self._race("atom", at, name, physical, whom, size)
                for address in np.unique(physical):
                    seats = mine[physical == address]
                    self._atomic_at(at, place, address, kind, [v[seats] for v in values], size, old, seats)
                self._log("atom", name, size, there, whom)
        except Fault as fault:
            fault.lane = fault.lane if whom is None else int(whom[fault.lane])
            raise
        if which is not None:
            full = np.zeros(self.n, dtype)
            full[which] = old
            old = full
        return old

    def _atomic_at(self, at, place, address, kind, values, size, old, seats):
        address = u64(address)
        site = self.batch.sites[at]
        before = self.batch.memory.load(site, address, size, 1) if place is None else place.gather(address, size, 1)
        before = old.dtype.type(before.view(old.dtype))
        if kind in ACCUMULATE:
            chain = ACCUMULATE[kind].accumulate(np.concatenate([[before], values[0]]), dtype=old.dtype)
        elif kind == "exch":
            chain = np.concatenate([[before], values[0]]).astype(old.dtype)
        else:  # cas: compare, swap
            chain = [before]
            for compare, new in zip(*values):
                chain.append(new if chain[-1] == compare else chain[-1])
            chain = np.array(chain, old.dtype)
        old[seats] = chain[:-1]
        after = chain[-1].view(UNSIGNED[size])
        if place is None:
            self.batch.memory.store(site, address, after, size, 1)
        else:
            place.scatter(address, after, size, 1)

    def divisor(self, value, guard):
        zero = value == 0
        if not zero.any():
            return value
        active = zero if guard is None else zero & guard
        if active.any():
            raise Fault("a division by 0", int(np.flatnonzero(np.broadcast_to(active, self.n))[0]))
        return np.where(zero, value.dtype.type(1), value)
