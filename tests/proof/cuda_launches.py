"""Launches of the CUDA backend, recorded without a GPU.

The ops of csrc/cuda/library.cpp run on CPU tensors: their own checks and bindings, the real launcher, and below it a runtime
that keeps kernel, grid and parameter bytes instead of launching. The kernels are the PTX that nvcc makes for a target.
"""

import ctypes
import functools
from importlib import resources

import torch

import cuda_build
from proof.execute import Recording
from ptx import Launch, parse

NAME = "cuda"
OPS = ("step_", "normal_", "edit_", "fold_in", "run_keys", "raw_words")
NOT_PROVED = {op: "left to Triton" for op in ("project_", "lift_", "quantile_")}


@functools.cache
def _ops():
    """(the ops of the CUDA library, what their runtime has recorded)"""
    cuda_build.compiled()  # where that cannot be, nothing is defined
    library = torch.library.Library("fastdiff_cuda_recorded", "DEF")
    for schema in resources.files("fastdiff").joinpath("ops.schema").read_text().splitlines():
        if schema.strip():
            library.define(schema)
    return torch.ops.fastdiff_cuda_recorded, cuda_build.recorded_ops(), library


def _stolen(handle):
    """The tensor of a handle of libtorch's stable ABI, which is taken over."""
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(handle, None, None))


@functools.cache
def kernels(arch):
    """{mangled name: kernel} of sm_``arch``."""
    folder = cuda_build.compiled(arch)
    modules = [parse((folder / f"{unit}.ptx").read_text()) for unit in cuda_build.UNITS]
    return {name: kernel for module in modules for name, kernel in module.kernels.items()}


def record(arch, op, *args):
    """Runs an op of the CUDA library."""
    ops, lib, _ = _ops()
    lib.forget_launches()
    result = getattr(ops, op)(*args)
    own = [_stolen(lib.take_allocated()) for _ in range(lib.allocated_count())]  # what the op allocated, its result included
    launches = []
    for i in range(lib.launch_count()):
        shape = (ctypes.c_uint64 * 8)()
        lib.launch_shape(i, shape)
        kernel = kernels(arch)[lib.launch_kernel(i).decode()]
        parameters = ctypes.string_at(lib.launch_parameters(i), lib.launch_size(i))
        assert len(parameters) == kernel.param_bytes
        launches.append(Launch(kernel, tuple(shape[:3]), tuple(shape[3:6]), parameters, shape[6]))
    assert lib.other_count() == 0
    given = [t for value in (*args, *own) for t in (value if isinstance(value, list) else [value])]
    return Recording(result, launches, [t for t in given if isinstance(t, torch.Tensor)])


def record_unchecked_step(arch, case):
    """The CUDA library leaves indices that stand on the device to the kernel."""
    return record(arch, "step_", *case.args())


record_unchecked = record
