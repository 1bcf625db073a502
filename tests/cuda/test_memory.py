"""What a thread must not touch: memory behind a sample's last element, and inputs whose coefficient is zero. Runs in
processes of its own, beside a page that may not be accessed."""

import ctypes as c
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cuda_args as A
from cuda_build import emulator
from fastdiff import reference

PAGE = mmap.PAGESIZE
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mprotect as on Linux")


class Guarded:
    """One page of memory with a forbidden page behind it."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 2 * PAGE)
        self.start = c.addressof(c.c_char.from_buffer(self.memory))
        assert c.CDLL(None, use_errno=True).mprotect(c.c_void_p(self.start + PAGE), c.c_size_t(PAGE), 0) == 0
        self.forbidden = self.start + PAGE

    def last(self, count, dtype):
        """The last `count` elements of the page, as a tensor and its address, which is a multiple of 16."""
        size = 2 if dtype != torch.float32 else 4
        at = PAGE - -(-count * size // 16) * 16
        whole = torch.frombuffer(self.memory, dtype=torch.uint8, count=PAGE)
        return whole[at : at + count * size].view(dtype), self.start + at


def step(read, written, count, skip):
    """y = in_0 + 0 in_1 + noise, in_0 and y up to a forbidden page, in_1 in it: read unless ``skip``."""
    x, y = Guarded(), Guarded()
    (values, at_x), (_, at_y) = x.last(count, read), y.last(count, written)
    values.copy_(torch.arange(count) / 8)
    layout = reference.Layout(2, 1, 0, 1)
    coef, meta = np.zeros((1, layout.width), np.float32), np.array([[-1, 0, 0, 0]], np.int32)
    coef[0, layout.y(0)], coef[0, layout.y(0) + 1], coef[0, layout.y(0) + 3] = 1, 0 if skip else 1, 1
    keys = np.array([3, 4], np.int64)
    a = A.StepArgs(batch=1, numel=count, tokens=1, rows=1, listed=2, layout=A.RowLayout(2, 1, 0, 1), coef=coef.ctypes.data,
                   meta=meta.ctypes.data, keys=keys.ctypes.data)
    a.in_[0] = A.View(at_x, 0, 0, 1, A.DTYPES[read])
    a.in_[1] = A.View(x.forbidden, 0, 0, 1, A.DTYPES[read])
    a.out[0] = A.View(at_y, 0, 0, 1, A.DTYPES[written])
    assert emulator().emulate_step(c.byref(a)) == 0
    expected = (values.float() + torch.from_numpy(reference.normal(keys, count))).to(written)
    assert torch.equal(y.last(count, written)[0], expected)


def elsewhere(*calls):
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    code = f"import sys; sys.path[:0] = {folders!r}\nimport test_memory, torch\nfor call in {list(calls)!r}: test_memory.step(*eval(call))\nprint('done')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_neither_the_end_nor_what_is_not_needed_is_touched():
    # Eight elements a thread are two vectors in float32: of the last thread's, the second lies in the forbidden page.
    done = elsewhere("torch.float32, torch.float16, 12, True", "torch.float16, torch.float32, 12, True",
                     "torch.float32, torch.float32, 5, True", "torch.float32, torch.bfloat16, 20, True")
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


def test_the_guard_works():
    assert elsewhere("torch.float32, torch.float32, 5, False").returncode < 0
