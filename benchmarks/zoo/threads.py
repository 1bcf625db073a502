"""Imported before torch by the programs of the zoo: how OpenMP's threads wait for one another, and what becomes of freed memory.

Threads that spin while they wait starve one another when another program takes a core: a training step was measured to
take 25 times as long. A bounded spin, then sleep, costs nothing on idle cores. libgomp reads this when torch is loaded.
"""

import ctypes
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_kept = False


def keep_memory() -> bool:
    """For programs that time something: freed memory is kept, as a GPU's allocator keeps it. Returns whether it is.

    glibc gives large blocks back to the system when they are freed, or does not, by what was freed before; every page that was given
    back is faulted in again: 12,000 a step of a batch of 64, a fifth of its time.
    """
    global _kept
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    _kept = mallopt is not None and all(mallopt(option, 2**30) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
    return _kept


def memory_is_kept() -> bool:
    return _kept
