"""Kernels around a few instructions, for the tests: every thread loads its elements, the instructions run, results are stored."""

import numpy as np

from ptx import Memory, parse, run

HEAD = ".version 8.6\n.target sm_90\n.address_size 64\n"


def register_type(dtype):
    dtype = np.dtype(dtype)
    return "b16" if dtype.itemsize < 2 else f"b{8 * dtype.itemsize}"


def module(body, params="", declarations="", directives=""):
    """The kernel ``k`` with this body; registers %r (32), %rd (64), %h (16) and %p are declared."""
    return parse(f"{HEAD}{declarations}\n.visible .entry k({params}){directives}\n{{\n.reg .pred %p<32>;\n.reg .b16 %h<32>;\n"
                 f".reg .b32 %r<64>;\n.reg .b64 %rd<64>;\n{body}\n}}\n").kernels["k"]


def elementwise(code, inputs, outputs, block=256):
    """What instructions make of %a0, %a1, ... (one element of each input a thread): the arrays %d0, %d1, ... (bool: %q0, ...)."""
    inputs = [np.array(x) for x in inputs]  # copies lie at multiples of 16 bytes
    n = inputs[0].size
    lines, params, memory, addresses = [], [], Memory(), []
    results = [np.zeros(n, np.uint8 if d is bool else d) for d in outputs]
    lines.append("mov.u32 %r60, %ctaid.x; mov.u32 %r61, %ntid.x; mov.u32 %r62, %tid.x; mad.lo.s32 %r62, %r60, %r61, %r62;\n"
                 f"setp.ge.u32 %p31, %r62, {n}; @%p31 ret;")
    for k, x in enumerate([*inputs, *results]):
        name = f"a{k}" if k < len(inputs) else f"d{k - len(inputs)}"
        params.append(f".param .u64 p{k}")
        addresses.append(memory.map(x, name=name))
        lines.insert(0, f".reg .{register_type(x.dtype)} %{name};")
        lines.append(f"ld.param.u64 %rd60, [p{k}]; mul.wide.u32 %rd61, %r62, {x.itemsize}; add.s64 %rd{40 + k}, %rd60, %rd61;")
        if k < len(inputs):
            lines.append(f"ld.global.u{8 * x.itemsize} %{name}, [%rd{40 + k}];")
    lines.append(code)
    for k, (x, d) in enumerate(zip(results, outputs)):
        if d is bool:
            lines.append(f"selp.b16 %d{k}, 1, 0, %p{k};")
        lines.append(f"st.global.u{8 * x.itemsize} [%rd{40 + len(inputs) + k}], %d{k};")
    kernel = module("\n".join([*lines, "ret;"]), ", ".join(params))
    run(kernel, -(-n // block), block, np.array(addresses, np.uint64).tobytes(), memory)
    return [x.astype(bool) if d is bool else x for x, d in zip(results, outputs)]
