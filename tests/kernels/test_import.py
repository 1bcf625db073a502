"""The folder is the package fastdiff.kernels and nothing else, and its kernels say plainly what they cannot run on."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code, **env):
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **env}, cwd=ROOT.parent)


def test_the_short_name_is_refused():
    if not (ROOT / "kernels" / "__init__.py").exists():
        pytest.skip("not a checkout")
    done = run(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels")
    assert done.returncode != 0 and "ImportError" in done.stderr
    assert "fastdiff.kernels" in done.stderr and "Hugging Face" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_cpu_tensors_are_refused_unless_interpreted():
    done = run("import torch, fastdiff.kernels as k; k.normal_(torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int64))")
    assert "ValueError" in done.stderr and "cpu" in done.stderr and "TRITON_INTERPRET=1" in done.stderr, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreter_is_left_as_it_was():
    code = """
import torch, fastdiff.kernels as k
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, interpreter_builder as builder
look = lambda: (InterpreterBuilder.create_fma, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp,
                InterpreterBuilder.create_splat, InterpretedFunction.__call__, ReduceOps.generic_reduce, builder.options)
before = look()
k.normal_(torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int64))
k.edit_(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3), None, torch.ones(2, 1))
assert look() == before
"""
    done = run(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
