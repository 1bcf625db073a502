"""What every op means, in NumPy: exact (float32 with correctly rounded fma) and float64.

Slow on purpose, and free of every other part of the project: the kernels are held to this, bit by bit.
"""

from .brownian import path
from .edit import edit
from .float32 import DTYPES, fma, narrow, widen
from .normal import box_muller, box_muller64, normal, uniform
from .philox import fold_in, philox, raw_words, run_keys
from .project import lift, project
from .quantile import position, quantile
from .reduce import CHUNK, LANES, chunk_sums, combine, dot, norm
from .step import EXACT, FLOAT64, Layout, StepResult, step

__all__ = ["CHUNK", "DTYPES", "EXACT", "FLOAT64", "LANES", "Layout", "StepResult", "box_muller", "box_muller64", "chunk_sums",
           "combine", "dot", "edit", "fma", "fold_in", "lift", "narrow", "norm", "normal", "path", "philox", "position", "project",
           "quantile", "raw_words", "run_keys", "step", "uniform", "widen"]
