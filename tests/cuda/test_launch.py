"""The real launches (nvcc's object files) linked with a runtime that records instead of launching: one launch for each
op, of the planned grid, with parameter bytes that do on the CPU what the reference says."""

import ctypes as c

import pytest
import torch

import cuda_args as A
from cases import assert_same, expected_case
from cuda_build import emulator, launcher
from proof import draw_steering
from proof.draw import step_case
from test_edit_on_host import edit_plan


def recorded(call, *args):
    """Runs one call; (number of launches, kernel, grid and block and shared and stream)."""
    lib = launcher()
    lib.forget_launches()
    assert getattr(lib, call)(*args, c.c_void_p(0x5000)) == 0
    count = lib.launch_count()
    if count == 0:
        return 0, None, None
    shape = (c.c_uint64 * 8)()
    lib.launch_shape(0, shape)
    return count, lib.launch_kernel(0).decode(), list(shape)


def test_steps():
    kernels = set()
    for i in range(144):
        case = step_case(i)
        args = A.step_args(case)
        out = (c.c_int64 * 9)()
        assert emulator().emulate_plan(c.byref(args), out)
        elements, features, _, _, x, y, z, block_x, block_y = out
        outputs = len(case.outputs) or 3 if features == 3 else 3
        count, kernel, shape = recorded("real_step", c.byref(args))
        if elements == 0:
            assert count == 0
            continue
        assert count == 1 and shape == [x, y, z, block_x, block_y, 1, 0, 0x5000]
        assert f"step_kernelILi{elements}ELNS_8FeaturesE{features}ELi{outputs}E" in kernel
        kernels.add(kernel)
        # The recorded parameter starts with the arguments: run them.
        expected = expected_case(case)
        assert emulator().emulate_step(c.c_void_p(launcher().launch_parameters(0))) == 0
        assert_same(case, expected)
    assert len(kernels) == 11, "a kernel that no case launches"
    assert launcher().other_count() == 0


def test_noise_and_keys():
    keys, out, words = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 40), torch.zeros(3, 5, dtype=torch.int32)
    many, data = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for dtype, numel, elements in ((torch.float32, 32, 8), (torch.float32, 40, 4), (torch.float16, 32, 16), (torch.float16, 40, 8)):
        stored = torch.zeros(3, 48, dtype=dtype)
        a = A.NormalArgs(3, numel, keys.data_ptr(), 2, 1, A.view(stored[:, :numel]))
        count, kernel, shape = recorded("real_normal", c.byref(a))
        assert count == 1 and f"normal_kernelILi{elements}E" in kernel and shape[0] * shape[3] * elements >= numel
    a = A.FoldInArgs(count=3, dims=1, key_stride_pair=1, keys=keys.data_ptr(), data=data.data_ptr(), out=many.data_ptr())
    assert recorded("real_fold_in", c.byref(a))[:1] == (1,)
    a = A.RunKeysArgs(rows=1, noises=1, batch=3)
    assert recorded("real_run_keys", c.byref(a))[:1] == (1,)
    a = A.RawWordsArgs(3, 5, keys.data_ptr(), 2, 1, words.data_ptr())
    count, kernel, shape = recorded("real_raw_words", c.byref(a))
    assert count == 1 and "raw_words" in kernel and shape[0] * shape[3] * 4 >= 5 and shape[1] * shape[4] >= 3


def test_edits():
    """Two launches, of which the first sums; one where there are no terms, none where nothing is to be done."""
    lib, sums = launcher(), torch.zeros(4096)
    kernels = set()
    for i in range(48):
        out, h, bank, index, weight = draw_steering.case("edit_", i)
        args = A.edit_args(out, h, bank, index, weight)
        p = edit_plan(args)
        count, first, shape = recorded("real_edit", c.byref(args), c.c_void_p(sums.data_ptr()))
        if weight.shape[1] == 0:
            assert count == (0 if p["in_place"] else 1)
            continue
        assert count == 2 and shape == [*p["squares_grid"], 1, 0, 0x5000] and f"squares_kernelILi{p['vector']}E" in first
        second, shape = lib.launch_kernel(1).decode(), (c.c_uint64 * 8)()
        lib.launch_shape(1, shape)
        assert list(shape) == [*p["grid"], 1, 0, 0x5000]
        assert f"edit_kernelILi{p['elements']}ELNS_8FeaturesE{p['features']}E" in second
        kernels |= {first, second}
    assert len(kernels) == 7, "a kernel that no case launches"


@pytest.mark.parametrize("call, args", [
    ("real_step", A.StepArgs()), ("real_normal", A.NormalArgs()), ("real_fold_in", A.FoldInArgs()),
    ("real_run_keys", A.RunKeysArgs()), ("real_raw_words", A.RawWordsArgs())])
def test_nothing_to_do_launches_nothing(call, args):
    assert recorded(call, c.byref(args))[0] == 0


def test_nothing_to_edit_launches_nothing():
    assert recorded("real_edit", c.byref(A.EditArgs()), None)[0] == 0
