"""The project's own kernels: every instruction is known for each target, and a few real launches give the reference's bits."""

import ctypes
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import assert_same, expected_case, random_case
from ptx import Memory, parse, run, unsupported

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "cuda"))
cuda_build, cuda_args = pytest.importorskip("cuda_build"), pytest.importorskip("cuda_args")
if not cuda_build.CUDA.is_dir():
    pytest.skip("the sources (csrc/cuda) are not here: an installed package is tested", allow_module_level=True)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("unit", cuda_build.UNITS)
def test_cuda_kernels_are_understood(arch, unit):
    module = parse((cuda_build.compiled(arch) / f"{unit}.ptx").read_text())
    assert unsupported(module) == []
    assert len(module.kernels) > 4 and all(len(k.instructions) > 80 and k.maxntid for k in module.kernels.values())
    assert all(k.shared_bytes == k.local_bytes == 0 for k in module.kernels.values())


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_kernels_are_understood(arch):
    pytest.importorskip("triton")
    environment = dict(os.environ, PYTHONPATH=str(TESTS))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "ptx.supported", "--backends", "triton", "--targets", str(arch), "--drawn", "2", "--names",
               "tokens", "everything fp16"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS)
    assert done.returncode == 0 and done.stdout.count(" 0 not known") == 2 + 3 + 2, done.stdout + done.stderr


@pytest.mark.parametrize("seed", range(6))
def test_recorded_launches_of_the_step(seed):
    """What the real launcher asks for, on the tensors' own memory."""
    case = random_case(random.Random(seed), dtypes=("float32",) if seed % 2 else ("float32", "float16", "bfloat16"), bank=seed > 2, masks=seed > 4,
                       row_kinds=("int", "tokens") if seed > 4 else ("int", "scalar", "batch"), empty=False)
    lib, expected = cuda_build.launcher(), expected_case(case)
    lib.forget_launches()
    assert lib.real_step(ctypes.byref(cuda_args.step_args(case)), None) == 0 and lib.launch_count() == 1
    shape = (ctypes.c_uint64 * 8)()
    lib.launch_shape(0, shape)
    kernel = parse((cuda_build.compiled() / "step.ptx").read_text()).kernels[lib.launch_kernel(0).decode()]
    memory = Memory()
    for name, value in case.items():
        for t in value if isinstance(value, list) else [value]:
            if isinstance(t, torch.Tensor):
                memory.map(t, name=name)
    counts = run(kernel, shape[:3], shape[3:6], ctypes.string_at(lib.launch_parameters(0), lib.launch_size(0)), memory)
    assert_same(case, expected)
    assert counts.threads == shape[0] * shape[1] * shape[2] * shape[3] * shape[4] and counts.barriers == 0
