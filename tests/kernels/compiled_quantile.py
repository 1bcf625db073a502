"""Compiles the kernels of quantile_ for GPUs that need not be there, and says what came out, as JSON. Run by test_quantile.py in a
process of its own:  python compiled_quantile.py ARCH [short], a compute capability or the name of an AMD GPU"""

import json
import sys

import torch
import triton
from compiled import bound, facts
from compiled_vectors import on_amd, samples
from triton.backends.compiler import GPUTarget

from fastdiff.kernels import quantile

DTYPES = (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16))
SHAPES = {"": (4, 64, 64), ", odd size": (3, 7, 11), ", channels last": (4, 64, 64)}


def launches():
    """(name, kernel, arguments, options) of every kernel, on every kind of memory at least once."""
    for label, shape in SHAPES.items():
        for name, dtype in DTYPES[: 1 if label else 3]:
            x, m = samples(2, shape, dtype, label == ", channels last"), samples(2, shape, dtype)
            counts = torch.zeros(2, quantile.ROWS, quantile.BINS, dtype=torch.int64)
            row = torch.zeros(2, dtype=torch.int64)
            launched = quantile.launches(counts, torch.zeros(2), torch.zeros(2, 3), [x, m], torch.zeros(5, 9), row, 0, torch.ones(2, 2),
                                         0.995, 1.0, 2.0)
            for number, (kernel, (_, args, options)) in enumerate(launched):
                if number < quantile.PASSES:
                    yield f"pass {number} {name}{label}", kernel, args, options
                elif not label and dtype == torch.float32:
                    yield "quantile", kernel, args, options


def everything(arch, short):
    result = {}
    for name, kernel, args, options in launches():
        if short and (", " in name or "fp16" in name or "bf16" in name):
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
