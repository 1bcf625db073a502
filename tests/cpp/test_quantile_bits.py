"""quantile_ in C++ against the exact reference, bit by bit: whatever hypothesis draws, on each instruction set, with 1 and 2
threads; and against torch and NumPy, on samples too large to draw."""

import math
import random

import numpy as np
import pytest
import torch
from cpp.bits import run
from hypothesis import HealthCheck, given, settings
from quantile_cases import QuantileCase, quantile_cases, random_quantile_case

from fastdiff import reference

once = settings(max_examples=60, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])


def simple(inputs, q, coef=None, low=1.0, high=math.inf):
    """A case that writes both results."""
    B = len(inputs[0])
    coef = torch.ones(1, len(inputs)) if coef is None else coef
    return QuantileCase(dict(out=torch.zeros(B), clip=torch.zeros(B, 3), inputs=inputs, coef=coef, row=None, row_index=0, scale=None,
                             q=q, low=low, high=high))


def test_any_case(ops, isa, threads):
    @once
    @given(case=quantile_cases())
    def check(case):
        run(ops, case)

    check()


def test_any_case_with_flush_denormal(ops, isa, flushing):
    for seed in range(12):
        run(ops, random_quantile_case(random.Random(seed), max_numel=600), flushing)


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [2**14, 2**14 + 1, 5 * 2**14 - 1, 2**18 + 77])
def test_pieces_of_a_sample(ops, isa, threads, n):
    """With a thread each, where there are more threads than samples."""
    for q in (0.5, 0.995, 1.0):
        run(ops, simple([normals(2, n), normals(2, n, seed=1).to(torch.bfloat16)], q, torch.tensor([[0.7, -0.4]])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch(ops, isa, threads, dtype):
    """16-bit values are many times the same: ranks fall inside of long runs."""
    x = normals(2, 2**18 + 1).to(dtype)
    for q in (0.0, 0.1, 0.995, 1.0):
        case = simple([x], q)
        case.run(ops)
        assert torch.equal(case.arguments["out"], torch.quantile(x.float().abs(), q, dim=1))


def test_beyond_torch(ops):
    """More than 2^24 elements, by NumPy's selection; and 2^24, the last that torch takes."""
    n = 2**24 + 4099
    x = normals(1, n).half()
    size = np.abs(x[0].numpy().astype(np.float32))
    for q in (0.995, 0.3):
        case = simple([x], q)
        case.run(ops)
        below, above, w = reference.position(n, q)
        a, c = np.partition(size, (below, above))[[below, above]]
        expected = reference.fma(w, c - a, a) if w < 0.5 else reference.fma(w - np.float32(1), c - a, c)
        assert case.arguments["out"].item() == expected.item()
    last = simple([x[:, : 2**24].clone()], 0.9)
    last.run(ops)
    below, above, w = reference.position(2**24, 0.9)
    assert np.partition(size[: 2**24], below)[below] <= last.arguments["out"].item() <= np.partition(size[: 2**24], above)[above]


def test_sample_does_not_depend_on_its_batch(ops, isa):
    for seed in range(16):
        case = random_quantile_case(random.Random(seed), empty=False)
        alone = case.clone()
        case.run(ops)
        for b in range(len(case.arguments["inputs"][0])):
            cut = dict(alone.arguments, inputs=[t[b : b + 1] for t in alone.arguments["inputs"]])
            for name in ("out", "clip", "scale"):
                cut[name] = None if cut[name] is None else cut[name][b : b + 1]
            if cut["row"] is not None and cut["row"].dim():
                cut["row"] = cut["row"][b : b + 1]
            one = QuantileCase(cut)
            one.run(ops)
            for x, y in zip(one.written(), case.written()):
                assert torch.equal(x[0].view(torch.int32), y[b].view(torch.int32)), (seed, b)


def test_its_clip_is_what_the_step_takes(ops, isa):
    """d of the step with that clip: |d| at most 1, and the share of elements at 1 is that of the quantile."""
    x, m = normals(3, 4, 20, 20), normals(3, 4, 20, 20, seed=1).half()
    layout = reference.Layout(2, 1)
    coef = torch.zeros(2, layout.width)
    coef[:, :2] = torch.tensor([[1.5, -0.5], [4.0, 2.0]])
    coef[:, layout.y(0) + 2] = 1
    meta = torch.tensor([[-1, 1, 0, -1]] * 2, dtype=torch.int32)
    row = torch.tensor([0, 1, 1])
    clip, out = torch.zeros(3, 3), torch.zeros_like(x)
    ops.quantile_(None, clip, [x, m], coef, row, 0, None, 0.95, 1.0, math.inf)
    ops.step_([x, m], [out], None, coef, meta, row, 0, None, None, None, None, None, clip, None, None, None)
    d = coef[row, :1, None, None] * x + coef[row, 1:2, None, None] * m
    t = torch.quantile(d.abs().flatten(1), 0.95, dim=1)[:, None, None, None]
    assert torch.allclose(out, d.clamp(-t, t) / t, atol=1e-6)
    assert out.abs().max() <= 1 + 1e-7 and ((out.abs() > 0.9999).float().mean(dim=(1, 2, 3)) - 0.05).abs().max() < 0.002


def test_nothing_to_do(ops, isa):
    ops.quantile_(torch.zeros(0), torch.zeros(0, 3), [torch.zeros(0, 5)], torch.ones(1, 1), None, 0, None, 0.5, 1.0, 1.0)
