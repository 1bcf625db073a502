"""Runs a kernel: groups of threads, the one at the lowest place first; those that meet become one again."""

import traceback
from dataclasses import dataclass

import numpy as np

from .counts import Counts
from .group import Batch, Group
from .memory import Fault
from .syntax import PtxError
from .warp import NotConverged

THREADS = 32768  # of the blocks that run at once
STEPS = 5_000_000  # instructions of groups, after which a loop is taken to have no end


def run(kernel, grid, block, params, memory, shared=0, blocks=None, steps=STEPS):
    """Executes a launch and returns its ``Counts``.

    grid, block: (x, y, z), (x, y) or x; params: the parameter bytes; shared: bytes of dynamic shared
    memory; blocks: linear numbers or (x, y, z) of the blocks to run, None for all; steps: the limit of instructions of
    a group of threads. Raises ``PtxError`` with line, thread and block for what is not defined
    (the package lists what is noticed).
    """
    grid, block = ((*map(int, np.atleast_1d(shape)), 1, 1)[:3] for shape in (grid, block))
    threads = block[0] * block[1] * block[2]
    if min(*grid, *block) < 1 or threads > 1024 or grid[0] >= 2**31 or max(grid[1:]) > 65535 or block[2] > 64:
        raise PtxError(f"{kernel.name}: a grid of {grid} blocks of {block} threads cannot be launched")
    if kernel.reqntid and block != kernel.reqntid or kernel.maxntid and threads > np.prod(kernel.maxntid):
        raise PtxError(f"{kernel.name}: blocks of {block} threads; .reqntid is {kernel.reqntid}, .maxntid {kernel.maxntid}")
    if not kernel.param_bytes <= len(params) <= kernel.param_bytes + 7:
        raise PtxError(f"{kernel.name}: {len(params)} bytes of parameters, {kernel.param_bytes} are declared")
    if blocks is None:
        blocks = range(grid[0] * grid[1] * grid[2])
    else:
        blocks = [b if not isinstance(b, tuple) else b[0] + grid[0] * (b[1] + grid[1] * b[2]) for b in blocks]
    counts, size = Counts(), max(1, THREADS // threads)
    with np.errstate(all="ignore"):
        for at in range(0, len(blocks), size):
            _Run(Batch(kernel, grid, block, blocks[at:at + size], params, memory, shared, counts), steps).all()
    return counts


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, block, parameter bytes and dynamic shared memory."""

    kernel: object
    grid: tuple
    block: tuple
    params: bytes
    shared: int = 0

    def run(self, memory, blocks=None, **options):
        return run(self.kernel, self.grid, self.block, self.params, memory, self.shared, blocks, **options)


class _Run:
    def __init__(self, batch, steps):
        self.batch, self.program, self.left, self.limit = batch, batch.kernel.program, steps, steps
        self.chunks = self.program.chunks
        self.groups = [Group(batch, np.arange(batch.total), 0, {}, {})]
        self.waiting = []  # (group, barrier, threads that it waits for or None, index of the instruction, aligned)
        self.parked = []  # groups at an instruction of a whole warp whose other threads are elsewhere
        self.tally = {}

    def all(self):
        while True:
            while self.groups:
                self._advance(self._next())
            if self.parked:
                self._retry()
            elif self.waiting:
                self._stuck()
            else:
                break
        self._count()

    # ------------------------------------------------------------------------------------------------------- scheduling

    def _next(self):
        """The group at the lowest place, after those that stand there have become one."""
        groups = self.groups
        if len(groups) == 1 and not self.parked:
            return groups.pop()
        lowest = min(g.chunk for g in groups)
        here = [g for g in (*groups, *self.parked) if g.chunk == lowest]
        self.groups = [g for g in groups if g.chunk != lowest]
        self.parked = [g for g in self.parked if g.chunk != lowest]
        return here[0] if len(here) == 1 else self._merged(here)

    def _retry(self):
        """No group can run: threads may have ended since the others were parked."""
        parked, self.parked = self.parked, []
        before = sum(g.n for g in parked)
        for g in parked:
            self._advance(g)
        if not self.groups and sum(g.n for g in self.parked) == before:
            i = self.program.instructions[self.chunks[self.parked[0].chunk].first]
            self._fail(i, "threads that the mask names never arrive", self.parked[0], 0)

    def _live(self, chunk):
        return self.chunks[chunk].live_in if chunk < len(self.chunks) else ()

    def _part(self, g, seats, chunk):
        """The threads ``seats`` of a group, at a chunk."""
        R, partial, registers, rest = g.R, g.partial, {}, {}
        for n in self._live(chunk):
            value = R.get(n)
            if value is not None:
                registers[n] = value[seats] if value.ndim else value
            elif n in partial:
                value, valid = partial[n]
                valid = valid if valid is True or valid is False or not valid.ndim else valid[seats]
                value = value[seats] if value.ndim else value
                if valid is True or valid is not False and valid.all():
                    registers[n] = value
                elif valid is not False and valid.any():
                    rest[n] = (value, valid)
        return Group(self.batch, g.lanes[seats], chunk, registers, rest)

    def _merged(self, groups):
        lanes = np.concatenate([g.lanes for g in groups])
        order = np.argsort(lanes)
        rank = np.empty(len(order), np.intp)
        rank[order] = np.arange(len(order))
        places = np.split(rank, np.cumsum([g.n for g in groups])[:-1])
        registers, partial = {}, {}

        def joined(values):
            first = values[0]
            if first.ndim == 0:
                for v in values:
                    if v.ndim or v != first:
                        break
                else:
                    return first
            halves = any(v.ndim == 2 for v in values)  # what a pair has, by half
            out = np.empty((len(order), 2) if halves else len(order), first.dtype)
            for v, place in zip(values, places):
                out[place] = v[:, None] if halves and v.ndim == 1 else v
            return out

        for n in self._live(groups[0].chunk):
            if all(n in g.R for g in groups):
                registers[n] = joined([g.R[n] for g in groups])
                continue
            pieces = [(g.R[n], np.bool_(True)) if n in g.R else g.partial.get(n) for g in groups]
            some = next((p for p in pieces if p is not None), None)
            if some is not None:
                pieces = [p or (some[0].dtype.type(0), np.bool_(False)) for p in pieces]
                partial[n] = (joined([v for v, _ in pieces]), joined([np.asarray(valid)[()] for _, valid in pieces]))
        return Group(self.batch, lanes[order], groups[0].chunk, registers, partial)

    # -------------------------------------------------------------------------------------------------------- execution

    def _advance(self, g):
        """Runs a group until it ends, splits, waits, or another group may stand lower or where it stands."""
        chunks, tally, last = self.chunks, self.tally, len(self.chunks)
        alone = not self.groups and not self.parked
        while True:
            if g.chunk == last:
                return self._exit(g)
            chunk = chunks[g.chunk]
            self.left -= chunk.count
            if self.left < 0:
                self._fail(self.program.instructions[chunk.first], "the limit of steps: this loop seems to have no end", g, 0)
            try:
                result = self._call(chunk, g)
            except NotConverged as missing:
                return self._park(g, missing.ready)
            found = tally.get(g.chunk)
            if found is None:
                tally[g.chunk] = [g.n, g.warp_count]
            else:
                found[0] += g.n
                found[1] += g.warp_count
            kind = chunk.end[0]
            if kind == "next" or kind == "warp":
                g.chunk += 1
            elif kind == "bra":
                if result is None:
                    g.chunk = chunk.end[1]
                elif not self._branch(g, result, chunk.end[1]):
                    return
            elif kind == "bar":
                return self._wait(g, chunk, result)
            elif kind == "exit":
                if result is None:
                    return self._exit(g)
                if not self._branch(g, result, None):
                    return
            elif kind == "brx":
                return self._indexed(g, result, chunk)
            elif result is None or result.any():
                self._fail(self.program.instructions[chunk.last - 1], "a trap is reached", g, 0)
            else:
                g.chunk += 1
            if not alone:
                self.groups.append(g)
                return

    def _call(self, chunk, g):
        function = chunk.fast
        if function is None:
            function = chunk.fast = self.program.function(chunk, False)[0]
        try:
            return function(g, g.R)
        except KeyError:
            pass
        except Fault as fault:
            self._located(chunk, fault, g, False)
        if chunk.checked is None:
            chunk.checked = self.program.function(chunk, True)[0]
        g.valid = {}
        try:
            return chunk.checked(g, g.R)
        except Fault as fault:
            self._located(chunk, fault, g, True)

    def _branch(self, g, taken, target):
        """Moves or splits a group; target None ends the threads. False if the group is no longer one."""
        if taken.ndim == 0:
            count = g.n if taken else 0
        else:
            count = int(np.count_nonzero(taken))
        if count == 0:
            g.chunk += 1
            return True
        if count == g.n:
            if target is None:
                self._exit(g)
                return False
            g.chunk = target
            return True
        there, here = np.flatnonzero(taken), np.flatnonzero(~taken)
        if target is None:
            self._end(g.lanes[there])
        else:
            split = np.bincount(g.warps[there], minlength=g.warps[-1] + 1) > 0
            split &= np.bincount(g.warps[here], minlength=g.warps[-1] + 1) > 0
            self.batch.counts.bump("divergent_branches", int(np.count_nonzero(split)))
            self.groups.append(self._part(g, there, target))
        self.groups.append(self._part(g, here, g.chunk + 1))
        return False

    def _indexed(self, g, index, chunk):
        index, targets = np.broadcast_to(index, g.n), np.asarray(chunk.end[1])
        if int(index.max()) >= len(targets):
            lane = int(np.argmax(index))
            self._fail(self.program.instructions[chunk.last - 1], f"index {int(index[lane])} of {len(targets)} targets", g, lane)
        to = targets[index]
        places = np.unique(to)
        if len(places) > 1:
            split = sum(len(np.unique(to[g.warps == w])) > 1 for w in np.unique(g.warps))
            self.batch.counts.bump("divergent_branches", int(split))
        self.groups += [self._part(g, np.flatnonzero(to == place), int(place)) for place in places]

    def _end(self, lanes):
        self.batch.alive[lanes] = False
        if self.waiting:
            self._release()

    def _exit(self, g):
        self._end(g.lanes)

    def _park(self, g, ready):
        if ready.any():
            self.groups.append(self._part(g, np.flatnonzero(ready), g.chunk))
            # Parked ones join a group only when it comes by: keep the ready part from meeting them at once.
            self._advance(self.groups.pop())
        self.parked.append(self._part(g, np.flatnonzero(~ready), g.chunk))

    # --------------------------------------------------------------------------------------------------------- barriers

    def _wait(self, g, chunk, operands):
        i = self.program.instructions[chunk.last - 1]
        if any(o.ndim and (o != o[0]).any() for o in operands):
            self._fail(i, "threads name different barriers", g, 0)
        barrier, threads = (*(int(o if not o.ndim else o[0]) for o in operands), None)[:2]
        if barrier > 15 or threads is not None and (threads % 32 or not 0 < threads <= -(-self.batch.threads // 32) * 32):
            self._fail(i, f"barrier {barrier} of {threads} threads", g, 0)
        g.chunk += 1
        self.waiting.append((g, barrier, threads, i, chunk.end[1]))
        self._release()

    def _release(self):
        b = self.batch
        alive = b.alive.reshape(len(b.blocks), b.threads).sum(axis=1)
        for barrier in {w[1] for w in self.waiting}:
            entries = [w for w in self.waiting if w[1] == barrier]
            arrived = sum(np.bincount(g.lanes // b.threads, minlength=len(b.blocks)) for g, *_ in entries)
            threads = {w[2] for w in entries}
            if len(threads) > 1:
                g, _, _, i, _ = entries[-1]
                self._fail(i, f"barrier {barrier} is waited for with different numbers of threads", g, 0)
            needed = next(iter(threads)) or alive
            done = (arrived > 0) & (arrived >= np.minimum(needed, b.threads))
            if not done.any():
                continue
            self._same_place(entries, done)
            b.counts.bump("barriers", int(np.count_nonzero(done)))
            if b.races is not None:
                b.races.barrier(self._held(entries, done))
            self.waiting = [w for w in self.waiting if w[1] != barrier]
            for g, *rest in entries:
                go = done[g.lanes // b.threads]
                if go.any():
                    self.groups.append(g if go.all() else self._part(g, np.flatnonzero(go), g.chunk))
                if not go.all():
                    self.waiting.append((self._part(g, np.flatnonzero(~go), g.chunk), *rest))

    def _held(self, entries, done):
        """The warps that a barrier holds in the blocks where it is done: of one for all threads, all."""
        if entries[0][2] is None:
            return np.flatnonzero(np.repeat(done, self.batch.warps_a_block))
        return np.unique(np.concatenate([g.warps[done[g.lanes // self.batch.threads]] for g, *_ in entries]))

    def _same_place(self, entries, done):
        """The threads of a warp must wait at one instruction where the barrier is an aligned one."""
        seen = {}
        for g, _, _, i, aligned in entries:
            for warp in np.unique(g.warps[done[g.lanes // self.batch.threads]]):
                if seen.setdefault(int(warp), i) is not i and aligned:
                    other = seen[int(warp)].line
                    self._fail(i, f"threads of one warp wait at different barriers: the other is at line {other}", g, 0)

    def _stuck(self):
        places = "; ".join(f"{g.n} threads at line {i.line}: {i.text}" for g, _, _, i, _ in self.waiting)
        g, _, _, i, _ = self.waiting[0]
        self._fail(i, f"a barrier that is never released: {places}", g, 0)

    # ------------------------------------------------------------------------------------------------- counts and errors

    def _count(self):
        batch, counts = self.batch, self.batch.counts
        counts.bump("threads", batch.total)
        if batch.parameter_reads:
            counts.bump("loaded", batch.parameter_reads, "param")
        for number, (threads, warps) in self.tally.items():
            chunk = self.chunks[number]
            counts.add_chunk(self.program.names(chunk), chunk.first, chunk.last, threads, warps)
        counts.took(self.limit - self.left)

    def _located(self, chunk, fault, g, checked):
        """Raises what went wrong with the instruction of the line that it happened in."""
        _, where, _ = self.program.function(chunk, checked)
        name = f"<{self.batch.kernel.name}>"
        line = next(lineno for frame, lineno in traceback.walk_tb(fault.__traceback__) if frame.f_code.co_filename == name)
        self._fail(self.program.instructions[where[line - 2]], fault.message, g, fault.lane)

    def _fail(self, i, message, g, lane):
        b = self.batch
        raise PtxError(f"{b.kernel.name}, line {i.line}: {i.text}\n  {b.thread(g.lanes[lane])}: {message}") from None
