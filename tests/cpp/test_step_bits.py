"""C++ against the exact reference, bit by bit: whatever hypothesis draws, on each instruction set, 1 and 2 threads."""

import os
import random

import numpy as np
import pytest
import torch
from cases import BITS, NAMES, Case, assert_same, cases, expected_case, random_case
from hypothesis import HealthCheck, given, settings

from fastdiff import reference

once = settings(max_examples=60, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])


def run(ops, case, flush=None):
    expected = expected_case(case)  # before the mode changes: NumPy would flush too
    if flush is not None:
        flush(True)
    try:
        ops.step_.default(*case.args())
    finally:
        if flush is not None:
            flush(False)
    assert_same(case, expected)


@once
@given(case=cases())
def test_any_case(ops, isa, threads, case):
    run(ops, case)


@once
@given(case=cases())
def test_any_case_with_flush_denormal(ops, isa, threads, flushing, case):
    run(ops, case, flushing)


def test_flush_denormal_stays_as_it_was(ops, isa, flushing):
    case = random_case(random.Random(3))
    tiny = torch.tensor([1e-40])
    for mode in (True, False):
        flushing(mode)
        ops.step_(*case.args())
        assert (tiny * 1).view(torch.int32).item() == (0 if mode else tiny.view(torch.int32).item())


@pytest.mark.parametrize("seed", range(8))
def test_large_samples(ops, isa, threads, seed):
    """Samples that are divided among threads, whole blocks and the blocks at their ends."""
    run(ops, random_case(random.Random(seed), max_numel=20_000, max_batch=2, empty=False))


@pytest.mark.parametrize("seed", range(4))
def test_many_small_samples(ops, isa, threads, seed):
    run(ops, random_case(random.Random(seed), max_numel=7, max_batch=200, empty=False))


def test_no_input(ops, isa):
    """A row of noise alone."""
    layout = reference.Layout(0, 1, 0, 1)
    coef = torch.zeros(1, layout.width)
    coef[0, layout.y(0) + 1] = 0.5
    keys = torch.tensor([[[[7, 0], [-8, 2**32 - 2]]]])
    y = torch.full((2, 75), 3.0)
    ops.step_([], [y], None, coef, torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32), None, 0, keys, *[None] * 8)
    expected = np.float32(0.5) * reference.normal(keys[0, 0].numpy(), 75)
    assert np.array_equal(y.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_widens(ops, isa, dtype):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    run(ops, _copy(bits.view(dtype).reshape(1, -1), torch.empty(1, 65536)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrowing_around_every_16_bit_value(ops, isa, dtype):
    """Each value of 16 bits, the midpoint to its neighbour, and the float32 next to either, as well as every exponent
    with every third of a million of mantissas."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float().numpy()
    with np.errstate(all="ignore"):
        half = (values + (np.roll(values, -1) - values) / 2).astype(np.float32)
    around = np.concatenate([values, half]).view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)
    spread = np.arange(-(2**31), 2**31, 4099, dtype=np.int64).astype(np.int32)
    bits = np.concatenate([around.ravel(), spread])
    run(ops, _copy(torch.from_numpy(bits.view(np.float32))[None], torch.empty(1, len(bits), dtype=dtype)))


@pytest.mark.parametrize("exponent", [0, 20, 100, -100, -124, -126, -128, -140, -149])
def test_sums_at_midpoints(ops, isa, exponent):
    """x + w t just above, on and just below the midpoint of two float32, where rounding twice goes wrong."""
    one, ulp = 0x3F800000, np.arange(-3, 4)
    x = np.concatenate([np.arange(one, one + 40), np.arange(one + 2**23 - 20, one + 2**23)]).astype(np.int32).view(np.float32)
    t = (one + ulp).astype(np.int32).view(np.float32)
    x, t = (v.ravel() for v in np.meshgrid(np.concatenate([x, -x]), t))
    layout = reference.Layout(2, 1)
    for shift in (23, 24, 25):
        for w in (one + ulp - (shift << 23)).astype(np.int32).view(np.float32):
            coef = torch.zeros(1, layout.width)
            coef[0, layout.y(0)], coef[0, layout.y(0) + 1] = 1, float(w)
            with np.errstate(all="ignore"):
                inputs = [torch.from_numpy(np.ldexp(v, exponent).astype(np.float32))[None] for v in (x, t)]
            run(ops, Case(inputs, [torch.empty(1, len(x))], coef=coef, meta=torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32)))


def _copy(x, y):
    """y = x, as a row."""
    layout = reference.Layout(1, 1)
    coef = torch.zeros(1, layout.width)
    coef[0, layout.y(0)] = 1
    return Case([x], [y], coef=coef, meta=torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32))


def test_more_than_2_to_the_31_elements(ops):
    """fp16, in place: y = 0.5 x + 0.25 N, compared in places on either side of 2^31 and at the end."""
    n = 2**31 + 70_003
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 8 * 2**30:
        pytest.skip(f"8 GiB of free memory needed, {available / 2**30:.1f} GiB are free")
    layout = reference.Layout(1, 1, 0, 1)
    coef = torch.zeros(1, layout.width)
    coef[0, layout.y(0)], coef[0, layout.y(0) + 2] = 0.5, 0.25
    keys = torch.tensor([[[[11, 2**32 - 5]]]])
    x = torch.empty(1, n, dtype=torch.float16)
    x.view(torch.int16).fill_(0x3C00)
    places = [0, 2**30 - 40, 2**31 - 100, 2**31 + 300, n - 200]
    inputs = {}
    for p in places:
        inputs[p] = torch.randn(200).half()
        x[0, p : p + 200] = inputs[p]
    ops.step_([x], [x], None, coef, torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32), None, 0, keys, *[None] * 8)
    for p in places:
        noise = reference.normal(keys[0, 0, 0].numpy(), 200, first=p)
        y = reference.fma(np.float32(0.5), inputs[p].float().numpy(), np.float32(-0.0))
        y = reference.narrow(reference.fma(np.float32(0.25), noise, y), "float16")
        assert np.array_equal(x[0, p : p + 200].numpy().view(np.int16), y.view(np.int16)), p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 1), (2, 77), (4, 3, 5, 7), (1, 4, 64, 64), (2, 2, 3, 4, 5), (5,), (0, 4), (2, 0)])
def test_normal(ops, isa, threads, dtype, shape):
    generator = np.random.default_rng(1)
    keys = torch.from_numpy(generator.integers(-(2**63), 2**63 - 1, (shape[0], 2)))
    keys[:1, 1] = 2**32 - 3
    out = torch.full(shape, 9.0, dtype=dtype)
    if len(shape) == 4:
        out = out.to(memory_format=torch.channels_last)
    ops.normal_(out, keys)
    n = out[0].numel() if shape[0] else 0
    if out.numel() == 0:
        return
    expected = reference.narrow(reference.normal(keys.numpy(), n), NAMES[dtype]).reshape(shape)
    kind = np.int32 if dtype == torch.float32 else np.int16
    assert np.array_equal(out.contiguous().view(BITS[dtype]).numpy(), expected.view(kind))


def test_sample_does_not_depend_on_its_batch(ops, isa):
    for seed in range(20):
        case = random_case(random.Random(seed), aliases=False, empty=False, max_batch=4)
        alone = [case.clone() for _ in range(case.batch)]
        ops.step_(*case.args())
        for b, one in enumerate(alone):
            cut = {name: [t[b : b + 1] for t in value] if isinstance(value, list) else value for name, value in one.items()}
            for name in ("scale", "bank_index", "bank_weight", "clip", "known"):
                cut[name] = cut[name] if cut[name] is None else cut[name][b : b + 1]
            cut["ring"] = one.ring if one.ring is None else one.ring[:, b : b + 1]
            cut["keys"] = one.keys if one.keys is None else one.keys[:, :, b : b + 1]
            cut["row"] = one.row if one.row is None or one.row.dim() == 0 else one.row[b : b + 1]
            if one.mask is not None and len(one.mask) > 1:
                cut["mask"] = one.mask[b : b + 1]
            ops.step_(*Case(**cut).args())
            for y, z in zip(case.outputs, cut["outputs"]):
                assert torch.equal(y[b : b + 1].view(BITS[y.dtype]), z.view(BITS[z.dtype]))
