"""Runs PTX on the CPU, thread by thread in meaning, in NumPy over all threads at once in deed.

``parse`` reads a module, ``run`` (or ``Launch.run``) executes one of its kernels on a ``Memory`` and returns ``Counts``.
Every instruction, modifier and directive that is not known is a ``PtxError`` with its line.
"""

from .counts import Counts
from .flow import unsupported
from .machine import Launch, run
from .memory import Memory
from .parse import parse
from .syntax import PtxError

__all__ = ["Counts", "Launch", "Memory", "PtxError", "parse", "run", "unsupported"]
