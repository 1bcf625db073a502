"""What the interpreted kernels of project_, lift_ and edit_ are held to. Run by test_vectors.py in a process of its own:
TRITON_INTERPRET=1 python interpreted_vectors.py OP FIRST LAST | corners"""

import random
import sys

import torch
from vector_cases import VectorCase, assert_same, random_vector_case

import fastdiff.kernels as kernels
from fastdiff.kernels import edit, launch, lift, project, tile

assert launch.interpreted(), "TRITON_INTERPRET=1 must be in the environment"


def check(case):
    expected = case.expected()
    case.run(kernels)
    assert_same(case, expected)


def drawn(op, first, last):
    """Cases of every kind; one in four is of more than a chunk."""
    for seed in range(int(first), int(last)):
        size = dict(max_numel=2100, max_batch=1, max_terms=3) if seed % 4 == 0 else dict(max_numel=300, max_batch=3, max_terms=5)
        check(random_vector_case(random.Random(seed), op, **size))


def unchecked(case):
    """The launches without the checks, which refuse to CPU tensors what a device clamps."""
    a = case.args()
    if case.op == "edit_":
        sums = torch.empty(len(a[1]), -(-a[1][0].numel() // 2048))
        planned = zip((edit.squares_kernel, edit.edit_kernel), edit.arguments(sums, *a))
    else:
        module = project if case.op == "project_" else lift
        planned = [(getattr(module, case.op + "kernel"), module.arguments(*a))]
    options = {}
    for kernel, (programs, args, options) in planned:
        launch.run(kernel, a[0].device, programs, *args, **options)
    return options


def corners():
    """Indices out of range are clamped; 64-bit indices and a folded grid change nothing; wide accesses; more chunks than lanes."""
    for seed in range(12):
        case = random_vector_case(random.Random(seed), max_numel=40, max_batch=3, empty=False)
        if case.arguments["index"] is not None and case.arguments["index"].stride(0):
            case.arguments["index"][:, 0] = random.Random(seed).choice([-3, 100])
        if case.arguments.get("row") is not None:
            case.arguments["row"] += 100
        expected = case.expected()
        unchecked(case)
        assert_same(case, expected)

    saved = launch.LARGE, launch.MAX_GRID_Y
    launch.LARGE, launch.MAX_GRID_Y = 0, 2
    for seed in range(9):
        case = random_vector_case(random.Random(seed), max_numel=40, empty=False)
        expected = case.expected()
        assert unchecked(case)["LARGE"]
        assert_same(case, expected)
    launch.LARGE, launch.MAX_GRID_Y = saved

    modes = set()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, vectors, weight = torch.randn(2, 264).to(dtype), torch.randn(3, 264), torch.randn(2, 3)
        for op, args in (("project_", dict(out=torch.zeros(2, 3), x=x, basis=vectors, index=None, gain=weight, offset=weight, weight=None,
                                           row=None, row_index=1)),
                         ("edit_", dict(out=x, h=x, bank=vectors, index=None, weight=weight)),
                         ("lift_", dict(out=torch.zeros(2, 264), basis=vectors, index=None, weight=weight))):
            case = VectorCase(op, args)
            expected = case.expected()
            options = unchecked(case)
            modes |= {(op, value) for name, value in options.items() if name.endswith("MODE")}
            assert_same(case, expected)
    assert modes == {(op, tile.WIDE) for op in ("project_", "edit_", "lift_")}, modes

    n = 257 * 2048 + 1  # no more than one vector and one sample: every chunk takes the interpreter milliseconds
    x, ones = torch.randn(1, n, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1)
    check(VectorCase("project_", dict(out=torch.zeros(1, 1), x=x, basis=x.flip(1), index=None, gain=ones, offset=ones, weight=None, row=None,
                                      row_index=0)))


if __name__ == "__main__":
    corners() if sys.argv[1] == "corners" else drawn(*sys.argv[1:])
