"""The bodies of the CUDA kernels of edit_, compiled as C++ and run for every thread of the grids that would be launched, warp by
warp where they add up, against the exact reference: bits."""

import ctypes as c

import numpy as np
import pytest
import torch

import cuda_args as A
from cuda_build import emulator
from fastdiff import _reference_ops, reference
from fastdiff.testing.inputs import moved
from proof import draw_steering

NAMES = ("vector", "squares_grid", "elements", "features", "aligned", "inner", "in_place", "grid")


def edit_plan(args):
    """How ``edit_`` would be launched."""
    out = (c.c_int64 * 16)()
    valid = emulator().emulate_edit_plan(c.byref(args), out)
    values = list(out)
    values = [values[0], values[1:6], *values[6:11], values[11:16]]
    return dict(zip(NAMES, values), valid=bool(valid))


def run(out, h, bank, index, weight):
    args = A.edit_args(out, h, bank, index, weight)
    sums = torch.full((len(h) * -(-max(h[0].numel(), 1) // 2048),), float("nan"))
    assert emulator().emulate_edit(c.byref(args), c.c_void_p(sums.data_ptr())) == 0


def whole(t):
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("first", range(0, 60, 12))
def test_drawn_cases(first, clamped):
    for i in range(first, first + 12):
        args = draw_steering.case("edit_", i, clamped)
        expected = list(moved(dict(enumerate(args)), "cpu").values())
        _reference_ops.edit_(*draw_steering.within("edit_", expected))
        run(*args)
        assert torch.equal(whole(args[0]), whole(expected[0])), i


def test_every_kernel_is_met():
    plans = [edit_plan(A.edit_args(*draw_steering.case("edit_", i))) for i in range(24)]
    assert {p["vector"] for p in plans} == {1, 4, 8}
    assert {(p["elements"], p["features"]) for p in plans} == {(4, 0), (8, 0), (8, 3), (16, 3)}
    assert {p["in_place"] for p in plans} == {0, 1} and {bool(p["inner"]) for p in plans} == {False, True}


def simple(batch, numel, dtype=torch.float16):
    """Addresses without memory behind them: for plans."""
    samples = A.View(None, numel, 0, 1, A.DTYPES[dtype])
    return A.EditArgs(batch, numel, samples, samples, A.View(None, numel, 0, 1, 0), A.Terms(1, 1, 0, None, 0, None, 0))


@pytest.mark.parametrize("batch, numel", [(1, 1), (1, 2**33 + 5), (65536, 512), (3_000_000, 1), (70000, 4096), (5, 2**31 + 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grids_cover_everything_within_the_limits(batch, numel, dtype):
    p = edit_plan(simple(batch, numel, dtype))
    most = 8 if dtype == torch.float32 else 16
    assert p["valid"] and p["elements"] == (most if numel % (32 * most) == 0 else most // 2)
    for x, y, z, block_x, block_y in (p["grid"], p["squares_grid"]):
        assert x <= 2**31 - 1 and y <= 65535 and z <= 65535 and block_x * block_y <= 128
        assert block_x % 32 == 0, "a warp belongs to one sample"
        assert y * z * block_y >= batch
    x, _, _, block_x, _ = p["grid"]
    assert numel <= x * block_x * p["elements"] < numel + 128 * most
    x, _, _, block_x, _ = p["squares_grid"]
    assert -(-numel // 2048) <= x * block_x // 32 < -(-numel // 2048) + 4


@pytest.mark.parametrize("batch, numel", [(0, 16), (16, 0), (0, 0)])
def test_nothing_to_do(batch, numel):
    p = edit_plan(simple(batch, numel))
    assert p["valid"] and p["elements"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sample_without_a_term_keeps_every_bit(dtype):
    """NaN of any payload, in place and elsewhere; norms of 0 and weights of 0."""
    bits = np.arange(2**16, dtype=np.uint16) if dtype != torch.float32 else np.arange(0, 2**32, 65521, dtype=np.uint64).astype(np.uint32)
    h = torch.from_numpy(bits.view(np.int16 if bits.itemsize == 2 else np.int32)).view(dtype).reshape(1, -1)
    out, bank = torch.zeros_like(h), torch.ones(1, h.shape[1])
    run(out, h, bank, None, torch.zeros(1, 1))
    assert torch.equal(whole(out), whole(h))
    zeros = torch.full((1, 512), -0.0, dtype=dtype)
    out = torch.ones_like(zeros)
    run(out, zeros, bank[:, :512], None, torch.ones(1, 1))
    assert torch.equal(whole(out), whole(zeros))


@pytest.mark.parametrize("first", [2**31 - 2048, 2**31, 2**32 - 2048, 2**32, 2**33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rest", [1500, 2048])
def test_elements_beyond_2_31(first, dtype, rest):
    """The last chunk of a sample and its threads: the addresses are moved back, so that these land in a small buffer."""
    generator, size = torch.Generator().manual_seed(1), 4 if dtype == torch.float32 else 2
    h, bank, out = torch.randn(1, 2048, generator=generator).to(dtype), torch.randn(1, 2048, generator=generator), torch.zeros(1, 2048, dtype=dtype)
    weight = torch.tensor([[0.5]])
    a = A.edit_args(out, h, bank, None, weight)
    a.numel = first + rest
    for view, step in ((a.out, size), (a.h, size), (a.bank, 4)):
        view.data -= first * step
    emulator().emulate_chunk.restype = c.c_float
    total = emulator().emulate_chunk(c.byref(a), 0, c.c_int64(first // 2048))
    values = h[:, :rest].float().numpy()
    assert total == reference.chunk_sums(values, values)[0, 0] and edit_plan(a)["valid"]
    elements = edit_plan(a)["elements"]
    for column in range(first // elements, -(-(first + rest) // elements)):
        emulator().emulate_edit_thread(c.byref(a), c.c_float(3.0), 0, c.c_int64(column))
    expected = torch.from_numpy(reference.fma(np.float32(1.5), bank[:, :rest].numpy(), values)).to(dtype)
    assert torch.equal(out[:, :rest], expected) and not out[:, rest:].any()
