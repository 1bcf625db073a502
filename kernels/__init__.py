"""Triton kernels, installed as ``fastdiff.kernels``: the ops of ``fastdiff/ops.schema``, one file per family.

CUDA tensors are served compiled. CPU tensors are served by Triton's interpreter, for tests, where TRITON_INTERPRET=1 is in
the environment before Triton is imported.
"""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package fastdiff.kernels, not kernels: a top-level package of that name would shadow the Hugging Face "
        "package `kernels`. Import fastdiff.kernels, and do not put the checkout's root on sys.path in front of the installed packages"
    )

from .edit import edit_
from .lift import lift_
from .normal import normal_
from .philox import fold_in, raw_words, run_keys
from .project import project_
from .quantile import quantile_
from .step import step_

__all__ = ["edit_", "fold_in", "lift_", "normal_", "project_", "quantile_", "raw_words", "run_keys", "step_"]
