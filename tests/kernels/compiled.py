"""Compiles the kernels for a GPU that need not be there, and says what came out, as JSON. Run by test_compiled.py in a
process of its own:  python compiled.py ARCH [NAME ...] | drawn FIRST LAST | specializations"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import cases
from fastdiff.kernels import launch
from fastdiff.kernels.normal import normal_kernel
from fastdiff.kernels.step import arguments, prepare, step_kernel
from fastdiff.reference import Layout
from proof import lint

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def step_args(inputs, outputs, *, shape=(4, 64, 64), batch=2, ring=0, noises=0, bank=0, rows=8, scale=False, clip=False, mask=False,
              status=True, row=(), vectors=None, layout=torch.contiguous_format):
    """Arguments of ``step_`` with the given dtypes and features; the values do not matter. vectors: dtype of bank and mask."""

    def samples(dtype, lead=(batch,)):
        t = torch.zeros(*lead, *shape, dtype=dtype)
        return t.contiguous(memory_format=layout) if t.dim() == 4 else t

    K, O = len(inputs), len(outputs)
    width = Layout(K + ring, O, bank, noises).width
    first = (*outputs, *inputs)[0]
    return ([samples(d) for d in inputs], [samples(d) for d in outputs], samples(first, (ring, batch)) if ring else None,
            torch.zeros(rows, width), torch.zeros(rows, 4, dtype=torch.int32), torch.zeros(row, dtype=torch.int64), 0,
            torch.zeros(rows, noises, batch, 2, dtype=torch.int64) if noises else None,
            torch.zeros(batch, K + ring) if scale else None, samples(vectors or first, (5,)) if bank else None,
            torch.zeros(batch, bank, dtype=torch.int32) if bank else None, torch.zeros(batch, bank) if bank else None,
            torch.zeros(batch, 3) if clip else None, samples(first) if mask else None,
            torch.zeros(1, 1, *shape[1:], dtype=vectors or first) if mask else None, torch.tensor([2**31 - 1, 0], dtype=torch.int32) if status else None)


EVERYTHING = dict(ring=2, noises=3, bank=2, scale=True, clip=True, mask=True)
STEPS = {
    "ddim fp32": lambda: step_args([F32, F32], [F32]),
    "ddim fp16": lambda: step_args([F16, F16], [F16]),
    "ddpm fp32": lambda: step_args([F32, F32], [F32], noises=1),
    "ddpm fp16": lambda: step_args([F16, F16], [F16], noises=1),
    "ddpm bf16": lambda: step_args([BF16, BF16], [BF16], noises=1),
    "mixed": lambda: step_args([F32, F16, BF16], [F32, F16], noises=1),
    "odd size": lambda: step_args([F16, F16], [F16], noises=1, shape=(3, 7, 11)),
    "channels last": lambda: step_args([F32, F32], [F32], noises=1, layout=torch.channels_last),
    "tokens": lambda: step_args([F32, F32], [F32], noises=1, shape=(16, 64), row=(2, 16)),
    "steered": lambda: step_args([F16, F16], [F16], noises=1, bank=2, mask=True, vectors=F32),
    "everything fp32": lambda: step_args([F32] * 3, [F32] * 3, **EVERYTHING),
    "everything fp16": lambda: step_args([F16] * 3, [F16] * 3, **EVERYTHING),
}


def bound(kernel, args, options, arch):
    """What a launch on that architecture would compile: (signature, constants, attributes, options)."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    options = dict(options, enable_fp_fusion=False)
    values, specialization, rest = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, dict(options, debug=False), values, specialization, rest)
    return ASTSource(kernel, signature, constants, attributes), parsed, specialization


def compiled(kernel, args, options, arch):
    source, parsed, _ = bound(kernel, args, options, arch)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=parsed.__dict__)


def tool(name, *arguments):
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def facts(kernel, arch, elements):
    """What a compiled kernel is made of. elements: of one thread."""
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(kernel.asm["cubin"])
        usage, sass = tool("cuobjdump", "--dump-resource-usage", path), tool("cuobjdump", "-sass", path)
    opcodes = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    return {
        "shared": kernel.metadata.shared,
        "usage": {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)},
        "faults": lint.faults(ptx),
        "memory": dict(Counter(re.findall(r"\b(?:ld|st|atom|red)\.(?:global|shared|local)[\w.:]*", ptx))),
        "barriers": len(re.findall(r"\bbar(?:rier)?\.", ptx)),
        "shuffles": len(re.findall(r"\bshfl\.", ptx)),
        "spills": sum(op.split(".")[0] in ("LDL", "STL") for op in opcodes),
        "instructions": len([op for op in opcodes if op != "NOP"]),
        "wide multiplications": sum(op.startswith("IMAD.WIDE") for op in opcodes),
        "elements a thread": elements,
    }


def everything(arch, names):
    result = {}
    for name in names or [*STEPS, "normal fp32", "normal fp16"]:
        if name in STEPS:
            given = STEPS[name]()
            _, args, options = arguments(prepare(*given), *given)
            kernel = step_kernel
        else:
            out = torch.zeros(2, 4, 64, 64, dtype=F16 if name.endswith("fp16") else F32)
            g = launch.geometry([out])
            args = (out, out.stride(0), torch.zeros(2, 2, dtype=torch.int64), 2, g.batch, g.numel, g.inner, g.groups)
            options = dict(MODE=g.modes[0], LARGE=g.large, QUADS=g.quads, V=g.V, num_warps=g.num_warps)
            kernel = normal_kernel
        elements = options["QUADS"] * options["V"] // (32 * options["num_warps"])
        result[name] = facts(compiled(kernel, args, options, arch), arch, elements)
    return result


def drawn(first, last):
    """Facts of drawn cases: any mixture of dtypes, layouts and features."""
    result = {}
    for seed in range(first, last):
        case = cases.random_case(random.Random(seed), max_numel=3000, empty=False)
        _, args, options = arguments(prepare(*case.args()), *case.args())
        result[f"case {seed}: {case.note}"] = facts(compiled(step_kernel, args, options, 90), 90, 0)
    return result


def specializations():
    """What a launch is compiled for, over steps and sizes that must share one kernel."""

    def one(index=None, shape=(4, 64, 64), batch=2):
        args = list(step_args([F16, F16], [F16], noises=1, shape=shape, batch=batch))
        if index is not None:
            args[5], args[6] = None, index
        else:
            args[5] = torch.zeros(9, dtype=torch.int64)[3]  # a view at 8 bytes
        _, positional, options = arguments(prepare(*args), *args)
        return repr(bound(step_kernel, positional, options, 90)[2])

    return {"index": sorted({one(i) for i in (0, 1, 2, 15, 16)}), "row": sorted({one(), one(batch=7), one(shape=(4, 32, 32)), one(batch=16)})}


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    print(json.dumps(specializations() if what == "specializations" else drawn(*map(int, rest)) if what == "drawn"
                     else everything(int(what), rest)))
