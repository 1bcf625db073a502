"""What the executor does not know of the GPU kernels of this project: every instruction of every kernel, for each target.

    PYTHONPATH=tests python -m ptx.supported [--targets 80 90 100] [--backends cuda triton] [--drawn 20]

Prints one line a kernel, then the instructions that are not known; the exit status is 1 if there are any. For Triton that is
each of the specializations of tests/kernels/compiled.py and of ``drawn`` random cases.
"""

import argparse
import random
import sys
from pathlib import Path

from ptx import parse, unsupported

TESTS = Path(__file__).parents[1]


def cuda(arch):
    """(name, text) of the CUDA backend's units."""
    sys.path.append(str(TESTS / "cuda"))
    import cuda_build

    for unit in cuda_build.UNITS:
        yield unit, (cuda_build.compiled(arch) / f"{unit}.ptx").read_text()


def triton(arch, drawn, names=None):
    """(name, text) of the Triton backend's specializations."""
    sys.path.append(str(TESTS / "kernels"))
    import compiled
    import torch

    import cases
    from fastdiff.kernels import launch
    from fastdiff.kernels.normal import normal_kernel
    from fastdiff.kernels.step import arguments, prepare, step_kernel

    def text(given):
        _, args, options = arguments(prepare(*given), *given)
        return compiled.compiled(step_kernel, args, options, arch).asm["ptx"]

    for name in compiled.STEPS if names is None else names:
        yield name, text(compiled.STEPS[name]())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = torch.zeros(2, 4, 64, 64, dtype=dtype)
        g = launch.geometry([out])
        args = (out, out.stride(0), torch.zeros(2, 2, dtype=torch.int64), 2, g.batch, g.numel, g.inner, g.groups)
        options = dict(MODE=g.modes[0], LARGE=g.large, QUADS=g.quads, V=g.V, num_warps=g.num_warps)
        yield f"normal {dtype}", compiled.compiled(normal_kernel, args, options, arch).asm["ptx"]
    for seed in range(drawn):
        case = cases.random_case(random.Random(1000 * arch + seed), max_numel=3000, empty=False)
        yield f"case {seed}", text(case.args())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--drawn", type=int, default=20)
    parser.add_argument("--names", nargs="+")
    given = parser.parse_args()
    failures = []
    for arch in given.targets:
        for backend in given.backends:
            for name, text in cuda(arch) if backend == "cuda" else triton(arch, given.drawn, given.names):
                module = parse(text)
                unknown = unsupported(module)
                count = sum(len(k.instructions) for k in module.kernels.values())
                label = f"{backend} sm_{arch} {name}"
                print(f"{label}: {len(module.kernels)} kernels, {count} instructions, {len(unknown)} not known")
                failures += [f"{label} {kernel}: {message}" for kernel, message in unknown]
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
