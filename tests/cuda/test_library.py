"""fastdiff._C_cuda loads beside a CUDA torch, without a driver, and implements every op."""

import importlib.util
import subprocess
import sys

import pytest
import torch

CHECK = """
import torch, fastdiff._C, fastdiff._C_cuda
for name in ("step_", "normal_", "fold_in", "run_keys", "raw_words"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdiff::{name}", "CUDA"), name
print("ok")
"""


def test_cuda_implementations_are_registered():
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA: fastdiff._C_cuda is not built for it")
    if importlib.util.find_spec("fastdiff._C_cuda") is None:
        pytest.skip("fastdiff._C_cuda was not built (no nvcc, or FASTDIFF_SKIP_CUDA)")
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stderr
