"""Compiles the kernels of project_, lift_ and edit_ for GPUs that need not be there, and says what came out, as JSON. Run by
test_vectors.py in a process of its own:  python compiled_vectors.py ARCH [short], a compute capability or the name of an AMD GPU"""

import json
import sys

import torch
import triton
from compiled import bound, facts
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastdiff.kernels import edit, lift, project

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = {"": (4, 64, 64), ", odd size": (3, 7, 11), ", channels last": (4, 64, 64)}


def samples(count, shape, dtype=F32, channels_last=False):
    t = torch.zeros(count, *shape, dtype=dtype)
    return t.contiguous(memory_format=torch.channels_last) if channels_last else t


def launches():
    """(name, kernel, arguments, options) of every kernel, on every kind of memory at least once."""
    for label, shape in SHAPES.items():
        last = label == ", channels last"
        vectors, index, weight = samples(9, shape), torch.zeros(2, 9, dtype=torch.int32), torch.zeros(2, 9)
        for name, dtype in (("fp32", F32),) if label else (("fp32", F32), ("fp16", F16), ("bf16", BF16)):
            x, table = samples(2, shape, dtype, last), torch.zeros(5, 9)
            yield f"project {name}{label}", project.project_kernel, *project.arguments(
                torch.zeros(2, 9), x, vectors, index, table, table, weight, torch.zeros(2, dtype=torch.int64), 0)[1:]
            squares, added = edit.arguments(torch.zeros(2, 8), x, x, vectors, index, weight)
            yield f"squares {name}{label}", edit.squares_kernel, *squares[1:]
            yield f"edit {name}{label}", edit.edit_kernel, *added[1:]
        yield f"lift fp32{label}", lift.lift_kernel, *lift.arguments(samples(2, shape), vectors, None, weight)[1:]


def on_amd(kernel, args, options, arch):
    """The assembly for an AMD GPU."""
    target = GPUTarget("hip", arch, 64)
    backend, options = make_backend(target), dict(options, enable_fp_fusion=False)
    values, specialization, rest = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, dict(options, debug=False), values, specialization, rest)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=parsed.__dict__).asm["amdgcn"]


def everything(arch, short):
    result = {}
    for name, kernel, args, options in launches():
        if short and (", " in name or "fp16" in name):
            continue
        if arch.startswith("gfx"):
            result[name] = {"bytes": len(on_amd(kernel, args, options, arch))}
        else:
            source, parsed, _ = bound(kernel, args, options, int(arch))
            done = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=parsed.__dict__)
            result[name] = facts(done, int(arch), 0)
    return result


if __name__ == "__main__":
    print(json.dumps(everything(sys.argv[1], "short" in sys.argv[2:])))
