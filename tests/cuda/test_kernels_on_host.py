"""The bodies of the CUDA kernels, compiled as C++ and run for every thread of the grid that would be launched, against
the exact reference: bits. What a GPU adds to this, its own instructions, is read in test_device_code.py."""

import ctypes as c
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import cuda_args as A
from cases import assert_same, expected_case, random_case
from cuda_build import emulator
from fastdiff import reference

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "torch_func_random_2_14_1.json").read_text())


def run_step(case):
    args = A.step_args(case)
    assert emulator().emulate_step(c.byref(args)) == 0


def plan(args):
    out = (c.c_int64 * 9)()
    valid = emulator().emulate_plan(c.byref(args), out)
    names = ("elements", "features", "aligned", "inner", "x", "y", "z", "block_x", "block_y")
    return dict(zip(names, out), valid=bool(valid))


def test_structs_agree():
    out = (c.c_int64 * 32)()
    emulator().emulate_layout(out)
    assert list(out)[: len(A.layout())] == A.layout()
    assert max(out) <= 4096, "a kernel's parameters must fit into 4 KiB"


@pytest.mark.parametrize("block", range(20))
def test_drawn_cases(block):
    """Every feature, dtype and layout, at sizes that are rarely a multiple of anything; by turns all float32, without
    masks and tokens, and without the bank too: each kernel gets its share."""
    options = {"dtypes": ("float32",)} if block % 3 == 2 else {}
    if block % 4:
        options |= {"masks": False, "row_kinds": ("int", "scalar", "batch"), "bank": block % 4 == 1}
    for seed in range(12):
        case = random_case(random.Random(1000 * block + seed), **options)
        expected = expected_case(case)
        run_step(case)
        assert_same(case, expected)


@pytest.mark.parametrize("dtypes", [("float32",), ("float16",), ("bfloat16",), ("float32", "float16", "bfloat16")], ids=len)
@pytest.mark.parametrize("bank, masks", [(False, False), (True, False), (True, True)], ids=["plain", "bank", "everything"])
def test_vector_access_agrees(dtypes, bank, masks):
    """Aligned samples, so that loads and stores are vectors, at sizes where the last thread is whole or not."""
    met = set()
    for seed in range(40):
        case = random_case(random.Random(seed), dtypes=dtypes, layouts=("contiguous",), masks=masks, bank=bank,
                           row_kinds=("int", "scalar", "batch"), empty=False, max_batch=2)
        if case.sample[0].numel() % 8:
            continue
        expected = expected_case(case)
        args = A.step_args(case)
        p = plan(args)
        assert p["aligned"] or not case.inputs
        met.add((p["elements"], p["features"]))
        run_step(case)
        assert_same(case, expected)
    least = 4 if dtypes == ("float32",) else 8
    wanted = {(2 * least, 3), *[(least, 1)] * bank, *[(4, 2)] * masks}
    assert wanted <= met and (len(dtypes) == 3 or met <= wanted | {(least, 0), (4, 2)}), (wanted, met)


@pytest.mark.parametrize("seed", range(6))
def test_indices_on_the_device_are_clamped_and_flagged(seed):
    """The CPU's op refuses these; a device cannot know before it runs."""
    rng = np.random.default_rng(seed)
    case = random_case(random.Random(seed + 40), empty=False, masks=False, row_kinds=("batch",))
    while case.bank is None or case.status is None:
        seed += 100
        case = random_case(random.Random(seed), empty=False, masks=False, row_kinds=("batch",))
    case.row = torch.from_numpy(rng.integers(-3, len(case.coef) + 3, case.row.shape))
    case.bank_index = torch.from_numpy(rng.integers(-3, len(case.bank) + 3, case.bank_index.shape))
    slots = len(case.inputs) + (0 if case.ring is None else len(case.ring))
    case.coef[:, slots] = 0.5  # the bank's first term takes part in d
    expected = expected_case(case)
    run_step(case)
    assert_same(case, expected)


@pytest.mark.parametrize("masks, tokens", [(True, False), (False, True)])
def test_logical_order_where_it_matters(masks, tokens):
    """Samples that all lie channels-last, with a mask or with rows by token: these follow the logical order."""
    case = random_case(random.Random(5), masks=False, noise=False, bank=False, ring=False, aliases=False, empty=False, specials=False)
    shape, generator = (2, 4, 4, 8), torch.Generator().manual_seed(0)
    layout = reference.Layout(1, 1)
    case.inputs = [torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)]
    case.outputs = [torch.empty(shape).to(memory_format=torch.channels_last)]
    case.coef = torch.randn(4, layout.width, generator=generator)
    case.meta = torch.tensor([[-1, 8 * masks, 0, 0]] * 4, dtype=torch.int32)
    case.scale, case.clip, case.row, case.row_index, case.status = None, None, None, 1, None
    if tokens:
        case.row = torch.tensor([[0, 1, 2, 3], [3, 0, 2, 1]])
    if masks:
        case.coef[:, layout.mask + 1 :: 2] = 0
        case.known, case.mask = (torch.randn(s, generator=generator) for s in (shape, (2, 1, 4, 8)))
        case.known = case.known.to(memory_format=torch.channels_last)
    expected = expected_case(case)
    run_step(case)
    assert_same(case, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversions_exhaustively(dtype):
    stored = np.arange(2**16, dtype=np.uint16)
    wide = np.empty(2**16, np.float32)
    emulator().emulate_widen(stored.ctypes.data_as(c.c_void_p), wide.ctypes.data_as(c.c_void_p), c.c_int64(2**16), dtype == "bfloat16")
    expected = reference.widen(stored.view(np.float16) if dtype == "float16" else stored, dtype)
    nan = np.isnan(expected)
    assert np.array_equal(nan, np.isnan(wide)) and np.array_equal(wide[~nan].view(np.uint32), expected[~nan].view(np.uint32))

    # Every neighbourhood of a rounding boundary: each stored value, the midpoint after it, and an ulp on either side.
    bits = wide[~nan & np.isfinite(wide)].view(np.uint32)
    step = np.uint32(0x1000 if dtype == "float16" else 0x8000)
    values = np.concatenate([bits, bits + step, bits + step - np.uint32(1), bits + step + np.uint32(1),
                             np.arange(0, 2**32, 99991, dtype=np.uint64).astype(np.uint32)]).view(np.float32)
    values = np.ascontiguousarray(values[~np.isnan(values)])
    narrowed = np.empty(len(values), np.uint16)
    emulator().emulate_narrow(values.ctypes.data_as(c.c_void_p), narrowed.ctypes.data_as(c.c_void_p), c.c_int64(len(values)),
                              1 if dtype == "float16" else 2)
    assert np.array_equal(narrowed, reference.narrow(values, dtype).view(np.uint16))


# ------------------------------------------------------------------------------------------------------------- launches


def simple(batch, numel, dtype=torch.float32, noises=0):
    """y = in + noise, without memory for it: for plans and single threads."""
    layout = reference.Layout(1, 1, 0, noises)
    coef = np.zeros((1, layout.width), np.float32)
    coef[0, layout.y(0)] = 1
    coef[0, layout.y(0) + 2 :][:noises] = 1
    a = A.StepArgs(batch=batch, numel=numel, tokens=1, rows=1, listed=1, layout=A.RowLayout(1, 1, 0, noises))
    meta = np.array([[-1, 0, 0, 0]], np.int32)
    a.coef, a.meta = coef.ctypes.data, meta.ctypes.data
    a.in_[0] = A.View(None, numel, 0, 1, A.DTYPES[dtype])
    a.out[0] = A.View(None, numel, 0, 1, A.DTYPES[dtype])
    a.keep = coef, meta
    return a


@pytest.mark.parametrize("batch, numel", [(1, 1), (1, 2**33 + 5), (65536, 16), (3_000_000, 1), (2**31, 4),
                                          (70000, 4096), (5, 2**31 + 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grid_covers_everything_within_the_limits(batch, numel, dtype):
    p = plan(simple(batch, numel, dtype))
    most = 8 if dtype == torch.float32 else 16
    assert p["valid"] and p["elements"] == (most // 2 if numel % most else most)
    assert p["x"] <= 2**31 - 1 and p["y"] <= 65535 and p["z"] <= 65535 and p["block_x"] * p["block_y"] <= 128
    assert p["x"] * p["block_x"] * p["elements"] >= numel and p["y"] * p["z"] * p["block_y"] >= batch
    assert p["x"] * p["block_x"] * p["elements"] < 2 * numel + 128 * most
    assert p["y"] * p["z"] * p["block_y"] < batch + 128 * p["z"] + 128


@pytest.mark.parametrize("batch, numel", [(0, 16), (16, 0), (0, 0)])
def test_nothing_to_do(batch, numel):
    p = plan(simple(batch, numel))
    assert p["valid"] and p["elements"] == 0
    assert emulator().emulate_step(c.byref(simple(batch, numel))) == 0


@pytest.mark.parametrize("batch", [70_000])
def test_more_samples_than_a_grid_dimension(batch):
    x = torch.randn(batch, 3, generator=torch.Generator().manual_seed(0))
    out = torch.zeros_like(x)
    a = simple(batch, 3, noises=1)
    keys = torch.arange(2 * batch, dtype=torch.int64).reshape(1, 1, batch, 2)
    a.in_[0].data, a.out[0].data, a.keys, a.key_stride_b = x.data_ptr(), out.data_ptr(), keys.data_ptr(), 2
    assert emulator().emulate_step(c.byref(a)) == 0
    noise = reference.normal(keys[0, 0].numpy(), 3)
    assert np.array_equal(out.numpy(), x.numpy() + noise)


@pytest.mark.parametrize("first", [2**31 - 16, 2**31, 2**32 - 16, 2**32, 2**33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rest", [5, 256])
def test_elements_beyond_2_31(first, dtype, rest):
    """The last threads of a sample: the views' addresses are moved back, so that these land in a small buffer."""
    size = 4 if dtype == torch.float32 else 2
    first -= first % 2048 if rest == 256 else 0  # where a block begins
    x, out = torch.randn(512, generator=torch.Generator().manual_seed(1)).to(dtype), torch.zeros(512, dtype=dtype)
    a = simple(1, first + rest, dtype, noises=1)
    keys = torch.tensor([5, -3], dtype=torch.int64)
    a.in_[0].data, a.out[0].data, a.keys = x.data_ptr() - first * size, out.data_ptr() - first * size, keys.data_ptr()
    elements = plan(a)["elements"]
    assert elements == (8 if rest % 16 else 16) // (size // 2)
    for column in range(first // elements, -(-(first + rest) // elements)):
        assert emulator().emulate_step_thread(c.byref(a), c.c_int64(0), c.c_int64(column))
    noise = reference.normal(keys.numpy(), rest, first=first)
    expected = (x[:rest].float() + torch.from_numpy(noise)).to(dtype)
    assert torch.equal(out[:rest], expected) and not out[rest:].any()


def test_channels_last_without_noise_is_walked_in_memory_order():
    case = random_case(random.Random(3), masks=False, noise=False, bank=False, ring=False, aliases=False, empty=False)
    shape = (2, 4, 8, 8)
    case.inputs = [torch.randn(shape).to(memory_format=torch.channels_last) for _ in case.inputs]
    case.outputs = [torch.randn(shape).to(memory_format=torch.channels_last) for _ in case.outputs]
    case.row, case.scale, case.clip, case.row_index = None, None, None, 0
    p = plan(A.step_args(case))
    assert p["inner"] == 0 and p["aligned"]
    case.outputs[0] = torch.randn(shape)  # of another layout than the rest
    assert plan(A.step_args(case))["inner"] == 64


# ------------------------------------------------------------------------------------------------------- noise and keys


def key_tensor(pairs):
    return torch.from_numpy(np.array([[int(v) for v in pair] for pair in pairs], dtype=np.uint64).view(np.int64))


def raw_words(keys, count):
    out = torch.zeros(len(keys), count, dtype=torch.int32)
    a = A.RawWordsArgs(len(keys), count, keys.data_ptr(), keys.stride(0), keys.stride(1), out.data_ptr())
    assert emulator().emulate_raw_words(c.byref(a)) == 0
    return out.numpy().view(np.uint32)


@pytest.mark.parametrize("oracle", ["words", "triton"])
def test_raw_words_are_torchs_and_tritons(oracle):
    rows = VECTORS[oracle]
    keys = key_tensor([row["key"] for row in rows])
    assert raw_words(keys, 8).tolist() == [row["words"] for row in rows]
    assert raw_words(keys, 3).tolist() == [row["words"][:3] for row in rows]
    assert raw_words(keys.t().contiguous().t(), 8).tolist() == [row["words"] for row in rows]


def fold_in(keys, data):
    shape = torch.broadcast_shapes(keys.shape[:-1], data.shape)
    out = torch.zeros(*shape, 2, dtype=torch.int64)
    k, d = keys.expand(*shape, 2), data.expand(shape)
    a = A.FoldInArgs(count=d.numel(), dims=len(shape), key_stride_pair=k.stride(-1), keys=k.data_ptr(),
                     data=d.data_ptr(), out=out.data_ptr())
    a.size[: len(shape)], a.key_stride[: len(shape)], a.data_stride[: len(shape)] = shape, k.stride()[:-1], d.stride()
    assert emulator().emulate_fold_in(c.byref(a)) == 0
    return out


def test_fold_in_is_torchs():
    rows = VECTORS["keys"]
    data = torch.from_numpy(np.array([int(row["data"]) for row in rows], dtype=np.uint64).view(np.int64))
    assert torch.equal(fold_in(key_tensor([row["key"] for row in rows]), data), key_tensor([row["fold_in"] for row in rows]))
    for row in VECTORS["splits"]:
        assert torch.equal(fold_in(key_tensor([row["key"]])[0], torch.arange(5)), key_tensor(row["split"]))


def test_fold_in_broadcasts():
    keys = (torch.arange(24).reshape(3, 4, 2) * 77777).transpose(0, 1)  # (4, 3, 2), strided
    for data in (torch.arange(3), torch.arange(4)[:, None], torch.arange(20).reshape(5, 4).t()[:, :3], torch.tensor(-1)):
        assert np.array_equal(fold_in(keys, data).numpy(), reference.fold_in(keys.numpy(), data.numpy()))
    data = torch.arange(5)[:, None]
    expected = reference.fold_in(np.broadcast_to(keys[0].numpy(), (5, 3, 2)), data.numpy())
    assert np.array_equal(fold_in(keys[0], data).numpy(), expected)


def test_run_keys():
    seeds, streams, draws = torch.tensor([0, -1, 2**62]), torch.arange(8).reshape(2, 4).t(), torch.arange(8).reshape(4, 2) * 1000
    out = torch.zeros(4, 2, 3, 2, dtype=torch.int64)
    a = A.RunKeysArgs(rows=4, noises=2, batch=3, seed_stride=1, stream_stride=streams.stride(), draw_stride=draws.stride(),
                      seeds=seeds.data_ptr(), streams=streams.data_ptr(), draws=draws.data_ptr(), out=out.data_ptr())
    assert emulator().emulate_run_keys(c.byref(a)) == 0
    assert np.array_equal(out.numpy(), reference.run_keys(seeds.numpy(), streams.numpy(), draws.numpy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape, memory_format", [
    ((3, 1), None), ((2, 17), None), ((70, 33), None), ((1, 4, 8, 8), None), ((2, 3, 5, 7), torch.channels_last),
    ((1, 4, 8, 8), torch.channels_last), ((2, 2, 3, 4, 5), torch.channels_last_3d), ((2, 3, 1, 2), torch.channels_last)])
def test_normal(dtype, shape, memory_format):
    out = torch.full(shape, 7.0, dtype=dtype)
    if memory_format is not None:
        out = out.to(memory_format=memory_format)
    keys = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (shape[0], 2)))
    keys[0, 1] = -2
    a = A.NormalArgs(shape[0], out[0].numel(), keys.data_ptr(), keys.stride(0), keys.stride(1), A.view(out))
    assert emulator().emulate_normal(c.byref(a)) == 0
    name = str(dtype).split(".")[1]
    expected = reference.narrow(reference.normal(keys.numpy(), out[0].numel()), name)
    stored = out.contiguous().view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else out.contiguous().numpy()
    assert np.array_equal(stored.reshape(shape[0], -1).view(np.uint8), expected.view(np.uint8))
