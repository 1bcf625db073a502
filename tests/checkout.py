"""Imported before `benchmarks`, which is not installed: the checkout's root is on sys.path as long as that takes, see
benchmarks/__init__.py. Last on it, since it holds `kernels` too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import benchmarks  # noqa: E402, F401
