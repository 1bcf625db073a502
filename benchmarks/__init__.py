"""What is measured: steps, steering beside guidance, and the network that it is measured on.

Imported from the checkout's root, which leaves sys.path once this package is there: it holds `kernels` too, which is no
top-level package, and would hide the Hugging Face package of that name from transformers.
"""

import sys
from pathlib import Path

import benchmarks.zoo.threads  # noqa: F401  isort: skip  (before torch)
import fastdiff  # noqa: F401  perhaps from the root as well

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]
