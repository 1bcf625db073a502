"""What the interpreted kernels of quantile_ are held to. Run by test_quantile.py in a process of its own:
TRITON_INTERPRET=1 python interpreted_quantile.py FIRST LAST | corners"""

import random
import sys

import torch
from quantile_cases import assert_same, random_quantile_case

import fastdiff.kernels as kernels
from fastdiff.kernels import launch, quantile, tile

assert launch.interpreted(), "TRITON_INTERPRET=1 must be in the environment"


def drawn(first, last):
    """Cases of every kind; one in five takes more than one program a sample."""
    for seed in range(int(first), int(last)):
        size = dict(max_numel=2100, max_batch=1) if seed % 5 == 0 else dict(max_numel=300, max_batch=2)
        case = random_quantile_case(random.Random(seed), **size)
        expected = case.expected()
        case.run(kernels)
        assert_same(case, expected)


def unchecked(case):
    """The launches without the checks, which refuse to CPU tensors what a device clamps."""
    counts = torch.zeros(len(case.arguments["inputs"][0]), quantile.ROWS, quantile.BINS, dtype=torch.int64)
    every = []
    for kernel, (programs, args, options) in quantile.launches(counts, *case.args()):
        launch.run(kernel, counts.device, programs, *args, **options)
        every.append(options)
    return every[0], counts


def corners():
    """Rows out of range are clamped; 64-bit indices and a folded grid change nothing; wide accesses; counts add up."""
    for seed in range(4):
        case = random_quantile_case(random.Random(seed), max_numel=40, max_batch=2, empty=False)
        if case.arguments["row"] is None:
            case.arguments["row_index"] += 100
        else:
            case.arguments["row"] += random.Random(seed).choice([-9, 100])
        expected = case.expected()
        unchecked(case)
        assert_same(case, expected)

    saved = launch.LARGE, launch.MAX_GRID_Y
    launch.LARGE, launch.MAX_GRID_Y = 0, 2
    for seed in range(4):
        case = random_quantile_case(random.Random(seed), max_numel=40, empty=False)
        expected = case.expected()
        assert unchecked(case)[0]["LARGE"]
        assert_same(case, expected)
    launch.LARGE, launch.MAX_GRID_Y = saved

    modes = set()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        case = random_quantile_case(random.Random(1), empty=False)
        x = torch.randn(1, 264).to(dtype)
        case.arguments.update(out=torch.zeros(1), clip=None, inputs=[x], coef=torch.ones(1, 1), row=None, row_index=0, scale=None)
        expected = case.expected()
        options, counts = unchecked(case)
        modes |= set(options["MODES"])
        assert_same(case, expected)
        passes = counts[0, :-1].view(quantile.PASSES, 2, quantile.BINS)
        assert passes[0, 0].sum() == 264 and passes[0, 1].sum() == 0  # all elements; one prefix to begin with
        assert passes[1, 0].sum() in passes[0, 0], "those that share the first digit"
    assert modes == {tile.WIDE}, modes


if __name__ == "__main__":
    corners() if sys.argv[1] == "corners" else drawn(*sys.argv[1:])
