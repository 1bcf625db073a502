"""What the interpreted kernels are held to. Run by test_interpreted.py in a process of its own, since interpreted and compiled
Triton do not mix in one:  TRITON_INTERPRET=1 python interpreted.py CHECK [ARGUMENTS]"""

import ctypes
import random
import sys

import numpy as np
import torch
import triton
import triton.language as tl

import cases
import fastdiff.kernels as kernels
from fastdiff import reference
from fastdiff.kernels import launch, tile
from fastdiff.kernels.interpreter import exact
from fastdiff.kernels.step import EMPTY, arguments, prepare, step_kernel

assert launch.interpreted(), "TRITON_INTERPRET=1 must be in the environment"

EDGES = [0, 1, -1, 2**63 - 1, -(2**63), 2**32 - 1, 2**32, 2**31, -(2**32), -2, -3, 0x123456789ABCDEF]


def _keys():
    data = np.random.default_rng(0)
    pairs = np.array([(a, b) for a in EDGES for b in EDGES[:6]], dtype=np.int64)
    return torch.from_numpy(np.concatenate([pairs, data.integers(-(2**63), 2**63, (20, 2))]))


@triton.jit
def _randint4x_kernel(out, keys, N: tl.constexpr):
    i = tl.arange(0, N)
    w0, w1, w2, w3 = tl.randint4x(tl.load(keys), tl.load(keys + 1) + i.to(tl.int64))
    at = out + 4 * i
    tl.store(at, w0.to(tl.int32, bitcast=True))
    tl.store(at + 1, w1.to(tl.int32, bitcast=True))
    tl.store(at + 2, w2.to(tl.int32, bitcast=True))
    tl.store(at + 3, w3.to(tl.int32, bitcast=True))


def words():
    """Philox, fold_in and run_keys equal the reference and tl.randint4x, counters that wrap included."""
    keys = _keys()
    mine = kernels.raw_words(keys, 37)
    assert np.array_equal(mine.numpy().view(np.uint32), reference.raw_words(keys.numpy(), 0, 37))
    assert torch.equal(mine, kernels.raw_words(torch.cat([keys, keys], 1).t().contiguous().t()[:, 2:], 37)), "strided keys"
    theirs = torch.empty(len(keys), 64, dtype=torch.int32)
    for b in range(len(keys)):
        _randint4x_kernel[(1,)](theirs[b], keys[b].contiguous(), N=16)
    assert torch.equal(kernels.raw_words(keys, 64), theirs)

    data = torch.tensor(EDGES)
    assert np.array_equal(kernels.fold_in(keys[:, None], data).numpy(), reference.fold_in(keys.numpy()[:, None], data.numpy()))
    assert np.array_equal(kernels.fold_in(keys[0], torch.tensor(5)).numpy(), reference.fold_in(keys[0].numpy(), 5))
    streams, draws = torch.tensor(EDGES).reshape(4, 3), torch.tensor(EDGES[::-1]).reshape(4, 3)
    expected = reference.run_keys(keys[:5, 0].numpy(), streams.numpy(), draws.numpy())
    assert np.array_equal(kernels.run_keys(keys[:5, 0], streams, draws.t().contiguous().t()).numpy(), expected)
    assert kernels.run_keys(keys[:0, 0], streams, draws).shape == (4, 3, 0, 2) and kernels.raw_words(keys, 0).shape == (len(keys), 0)


def normals():
    """normal_ equals the reference for every dtype and layout, over several tiles and a folded grid."""
    rng, launch.MAX_GRID_Y = random.Random(1), 2
    for shape in [(), (1,), (3,), (257,), (5, 7), (3, 8, 8), (4, 5, 9), (2, 3, 4, 5), (1024,)]:
        for dtype in cases.DTYPES:
            batch = rng.randint(1, 5)
            layout = rng.choice(["contiguous", "channels_last", "strided"] if len(shape) in (3, 4) else ["contiguous", "strided"])
            out = cases._lay_out(cases._Random(rng), torch.zeros(batch, *shape), dtype, cases.Options(layouts=(layout,)))
            keys = _keys()[torch.randperm(len(_keys()), generator=torch.Generator().manual_seed(len(shape)))[:batch]]
            n = max(1, int(np.prod(shape)))
            expected = out.clone()
            cases._write(expected, reference.narrow(reference.normal(keys.numpy(), n), dtype))
            kernels.normal_(out, keys)
            assert torch.equal(out.view(cases.BITS[out.dtype]), expected.view(cases.BITS[out.dtype])), (shape, dtype, layout)


@triton.jit
def _narrow_kernel(out, x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tile.narrow(tl.load(x + i), out.dtype.element_ty))


@triton.jit
def _widen_kernel(out, x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.float32))


@triton.jit
def _fma_kernel(out, x, y, z, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


def conversions():
    """Every 16-bit number to float32; every boundary between 16-bit numbers back: torch and NumPy are the oracles."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype, canonical in ((torch.float16, 0x7E00), (torch.bfloat16, 0x7FC0)):
        stored, wide = every.view(dtype), torch.empty(65536)
        with exact():
            _widen_kernel[(1,)](wide, stored, N=65536)
        expected, nan = stored.float(), stored.isnan()
        assert torch.equal(wide.isnan(), nan) and torch.equal(wide[~nan].view(torch.int32), expected[~nan].view(torch.int32))

        # Each number, the middle to its neighbour, and one float32 to either side of both.
        bits = expected.view(torch.int32)
        finite = ~nan & ~expected.isinf()
        step = torch.where(finite, (torch.where(finite, stored, 0).view(torch.int16) + 1).view(dtype).float().nan_to_num(0, 3e38, -3e38), 0)
        middle = torch.where(finite, (expected.double() / 2 + step.double() / 2).float(), 0).view(torch.int32)
        for base in (bits, middle):
            for delta in (-1, 0, 1):
                x = (base + delta).view(torch.float32)
                out = torch.empty(65536, dtype=dtype)
                with exact():
                    _narrow_kernel[(1,)](out, x, N=65536)
                want = torch.where(x.isnan(), torch.tensor(canonical, dtype=torch.int16), x.to(dtype).view(torch.int16))
                assert torch.equal(out.view(torch.int16), want), (dtype, delta)

    data = np.random.default_rng(2)
    x, y, z = (torch.from_numpy(data.integers(-(2**31), 2**31, 4096).astype(np.int32)).view(torch.float32) for _ in range(3))
    y[1024:2048] = 1 + 2.0**-12 * torch.randint(1, 9, (1024,)).float()
    z[1024:3072] = -(x * y)[1024:3072]  # what is left is the error of the product
    z[3072:] = (x * y)[3072:] * 2.0**-24
    out = torch.empty(4096)
    with exact():
        _fma_kernel[(1,)](out, x, y, z, N=4096)
    fmaf = ctypes.CDLL("libm.so.6").fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    want = torch.tensor([fmaf(*v) for v in zip(x.tolist(), y.tolist(), z.tolist())])
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out[~out.isnan()].view(torch.int32), want[~out.isnan()].view(torch.int32))


def _launch(case):
    """The step without its checks."""
    programs, args, options = arguments(prepare(*case.args()), *case.args())
    launch.run(step_kernel, case.coef.device, programs, *args, **options)
    return options


def steps(first, last):
    """Cases of every kind."""
    for seed in range(int(first), int(last)):
        rng = random.Random(seed)
        kinds = ("int", "scalar", "batch", "tokens") if seed % 4 == 0 else ("int", "scalar", "batch")
        case = cases.random_case(rng, max_numel=40 if seed % 4 == 0 else 300, max_batch=3, row_kinds=kinds)
        expected = cases.expected_case(case)
        kernels.step_(*case.args())
        cases.assert_same(case, expected)


def aligned_steps(first, last):
    """Cases whose accesses are 16 or 8 bytes wide, as those of nearly every real latent are."""
    seen = set()
    for seed in range(int(first), int(last)):
        rng = random.Random(seed)
        cases._shape = lambda c, options: c.pick([(8,), (3, 4, 4), (4, 8, 8), (2, 2, 4, 4), (8, 5), (2, 260), (12,)])
        kind = seed % 3
        drawn = dict(max_batch=3, layouts=("contiguous",), dtypes=[("float16",), ("bfloat16",), ("float32", "float16")][kind])
        case = cases.random_case(rng, **drawn)
        expected = cases.expected_case(case)
        planned = prepare(*case.args())
        if planned is not EMPTY:
            options = planned[2]
            seen |= {(options["V"], mode) for mode in options["INPUT_MODES"] + options["OUTPUT_MODES"]}
        kernels.step_(*case.args())
        cases.assert_same(case, expected)
    assert {(8, tile.WIDE), (4, tile.WIDE)} <= seen, seen


def corners():
    """Indices out of range are clamped and reported; 64-bit indices and a folded grid change nothing; layouts that agree."""
    rng, clamped = random.Random(7), 0
    while clamped < 6:
        case = cases.random_case(rng, max_numel=60, max_batch=3, row_kinds=("scalar", "batch"), empty=False)
        if case.status is None:
            continue
        case.row += rng.choice([-7, 100])
        if case.bank_index is not None:
            case.bank_index[0, 0] = rng.choice([-1, 100])
        expected = cases.expected_case(case)
        assert int(expected.status[1]) & 1
        clamped += 1 + 2 * (int(expected.status[1]) == 3)
        _launch(case)
        cases.assert_same(case, expected)

    saved = launch.LARGE, launch.MAX_GRID_Y
    launch.LARGE, launch.MAX_GRID_Y = 0, 2
    for seed in range(12):
        case = cases.random_case(random.Random(seed), max_numel=40, max_batch=5, empty=False)
        expected = cases.expected_case(case)
        assert _launch(case)["LARGE"]
        cases.assert_same(case, expected)
    launch.LARGE, launch.MAX_GRID_Y = saved

    # A coefficient of 0 stays 0 whatever its factor, and clip leaves the sign of a zero that it does not move.
    layout = reference.Layout(3, 1, 1)
    coef = torch.zeros(1, layout.width)
    coef[0, 1], coef[0, layout.clip : layout.clip + 3] = 1, torch.tensor([-1.0, 0.0, 1.0])
    coef[0, layout.y(0) + 3] = 1  # y = d
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([[-0.0, 0.0, -0.5, -1.0, -2.0, 3.0, nan, inf, -inf, 1e-45]])
    case = cases.Case([values * nan, values, values / 0], [torch.ones(1, 10)], coef=coef, meta=torch.tensor([[-1, 1, 0, 0]], dtype=torch.int32),
                      scale=torch.tensor([[nan, 1.0, inf]]), bank=values / 0, bank_index=torch.tensor([[9]]),
                      bank_weight=torch.tensor([[nan]]), status=torch.tensor([2**31 - 1, 0], dtype=torch.int32))
    expected = cases.expected_case(case)
    assert int(expected.status[1]) == 0
    _launch(case)
    cases.assert_same(case, expected)

    # A NaN that is not stored is not reported.
    layout = reference.Layout(2, 1)
    coef = torch.zeros(1, layout.width)
    coef[0, 0] = 1
    case = cases.Case([values * nan], [torch.ones(1, 10)], torch.zeros(1, 1, 10), coef, torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32),
                      status=torch.tensor([2**31 - 1, 0], dtype=torch.int32))
    expected = cases.expected_case(case)
    assert expected.status.tolist() == [2**31 - 1, 0]
    _launch(case)
    cases.assert_same(case, expected)

    # Nor is what becomes of the places beyond the last element.
    for n in (18, 20):
        coef = torch.zeros(1, reference.Layout(1, 1).width)
        coef[0, reference.Layout(1, 1).y(0)] = inf
        case = cases.Case([torch.ones(2, n)], [torch.ones(2, n)], coef=coef, meta=torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32),
                          status=torch.tensor([2**31 - 1, 0], dtype=torch.int32))
        expected = cases.expected_case(case)
        assert expected.status.tolist() == [2**31 - 1, 0]
        _launch(case)
        cases.assert_same(case, expected)

    # Tokens that begin and end inside a row of the tile.
    cases._shape = lambda c, options: c.pick([(5, 7), (4, 1, 7), (3, 15)])
    for seed in range(6):
        case = cases.random_case(random.Random(seed), row_kinds=("tokens",), max_batch=2, empty=False)
        expected = cases.expected_case(case)
        assert _launch(case)["RAGGED"]
        cases.assert_same(case, expected)

    # Several tiles of a sample, the last one cut.
    cases._shape = lambda c, options: (3, 19, 11)
    for seed in range(6):
        case = cases.random_case(random.Random(seed), max_batch=2, row_kinds=("int",), empty=False)
        expected = cases.expected_case(case)
        _launch(case)
        cases.assert_same(case, expected)

    # Where nothing depends on the order of the elements, channels-last tensors are read in the order of memory.
    cases._shape = lambda c, options: (4, 3, 4)
    flat = 0
    for seed in range(12):
        case = cases.random_case(random.Random(seed), noise=False, masks=False, bank=False, ring=False, empty=False,
                                 dtypes=("float32",), layouts=("contiguous",), row_kinds=("int",), max_batch=2)
        for name in ("inputs", "outputs"):
            setattr(case, name, [t.contiguous(memory_format=torch.channels_last) for t in getattr(case, name)])
        expected = cases.expected_case(case)
        flat += tile.CHANNELS_LAST not in _launch(case)["OUTPUT_MODES"]
        cases.assert_same(case, expected)
    assert flat == 12, flat


if __name__ == "__main__":
    {f.__name__: f for f in (words, normals, conversions, steps, aligned_steps, corners)}[sys.argv[1]](*sys.argv[2:])
