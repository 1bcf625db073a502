"""Runs PTX on the CPU, thread by thread in meaning, in NumPy over all threads at once in deed.

``parse`` reads a module, ``run`` (or ``Launch.run``) executes one of its kernels on a ``Memory`` and returns ``Counts``.
Every instruction, modifier and directive that is not known is a ``PtxError`` with its line.

A result is worth something only if nothing undefined led to it. These are errors, with line, thread and block:

- an access outside of what is mapped, misaligned, or to what is read-only; a division by 0
- the use of a register that was never written, a load or an atomic operation of shared or local bytes that were never written
- two accesses to shared memory by different warps of a block of which one writes, where no barrier puts them in order, whatever
  values they see. Atomic operations need no order among themselves; volatile and relaxed loads and stores do, as do stores of
  one value. bar.sync and barrier.sync order, a whole block's or, with a number of threads, those that wait; fences do not
- threads that store different values to one global or shared address in one execution of an instruction (volatile stores, too)
- barriers and warp instructions at which threads are missing, loops without end

These are not noticed:

- hazards within a warp: its lanes run in lockstep here, also where only bar.warp.sync or shfl.sync would keep them in order
- races in global memory between instructions, threads of different blocks, or blocks that run in different batches: the order
  that threads take here decides what they see. Global memory is as written from the start
- an order that warps make by themselves (flags, locks in shared memory) is not seen: what relies on it is refused
"""

from .counts import Counts
from .flow import unsupported
from .machine import Launch, run
from .memory import Memory
from .parse import parse
from .syntax import PtxError

__all__ = ["Counts", "Launch", "Memory", "PtxError", "parse", "run", "unsupported"]
