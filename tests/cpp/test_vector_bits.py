"""project_, lift_ and edit_ in C++ against the exact reference, bit by bit: whatever hypothesis draws, on each instruction set, with
1 and 2 threads."""

import functools
import random

import numpy as np
import pytest
import torch
from cases import BITS
from cpp.bits import run
from hypothesis import HealthCheck, given, settings
from vector_cases import OPS, VectorCase, assert_same, random_vector_case, vector_cases

from fastdiff.reference.project import lift


once = settings(max_examples=40, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.mark.parametrize("op", OPS)
def test_any_case(ops, isa, threads, op):
    @once
    @given(case=vector_cases(op))
    def check(case):
        run(ops, case)

    check()


@pytest.mark.parametrize("op", OPS)
def test_any_case_with_flush_denormal(ops, isa, flushing, op):
    for seed in range(8):
        run(ops, random_vector_case(random.Random(seed), op, max_numel=600), flushing)


@pytest.mark.parametrize("op", OPS)
def test_many_terms_and_samples(ops, isa, threads, op):
    """Groups of samples, blocks of terms and what is left of them; samples that share their vectors and samples that do not."""
    for seed in range(3):
        run(ops, random_vector_case(random.Random(seed), op, max_terms=150, max_batch=40, max_numel=40, empty=False))


def vectors(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [255 * 2048, 256 * 2048 + 3, 300 * 2048 + 1])
def test_more_chunks_than_lanes(ops, isa, threads, n):
    x, basis, ones = vectors(0, 2, n), vectors(1, 3, n), torch.ones(1, 3)
    run(ops, VectorCase("project_", dict(out=torch.zeros(2, 3), x=x, basis=basis, index=None, gain=ones, offset=ones, weight=None, row=None,
                                         row_index=0)))
    if n % 2:
        run(ops, VectorCase("edit_", dict(out=x, h=x, bank=basis, index=None, weight=vectors(2, 2, 3))))


@functools.cache
def four_thousand_terms(op):
    """A case and what it must give. Most weights are 0, at the same terms for all samples but the last two."""
    B, M, n = 7, 4096, 37
    basis, weight = vectors(0, 100, n), vectors(1, B, M)
    generator = torch.Generator().manual_seed(2)
    index = torch.randint(0, 100, (B, M), generator=generator)
    index[1:5] = index[:1]
    weight *= torch.rand(M, generator=generator) < 0.05
    weight[5:] *= torch.rand(2, M, generator=generator) < 0.5
    table = vectors(4, 1, 100)
    case = VectorCase(op, {
        "lift_": dict(out=torch.zeros(B, n), basis=basis, index=index, weight=weight),
        "edit_": dict(out=torch.zeros(B, n), h=vectors(3, B, n), bank=basis, index=index, weight=weight),
        "project_": dict(out=torch.zeros(B, M), x=vectors(5, B, n), basis=basis, index=index, gain=table, offset=table, weight=weight,
                         row=None, row_index=0)}[op])
    return case, case.expected()


@pytest.mark.parametrize("op", OPS)
def test_four_thousand_terms(ops, isa, threads, op):
    case, expected = four_thousand_terms(op)
    case = case.clone()
    case.run(ops)
    assert_same(case, expected)


@pytest.mark.parametrize("op", OPS)
def test_sample_does_not_depend_on_its_batch(ops, isa, op):
    for seed in range(12):
        case = random_vector_case(random.Random(seed), op, empty=False)
        alone = case.clone()
        case.run(ops)
        out = case.arguments["out"]
        for b in range(len(out)):
            cut = {name: t[b : b + 1] if isinstance(t, torch.Tensor) and name in ("out", "x", "h", "index", "weight") else t
                   for name, t in alone.items()}
            if cut.get("row") is not None and cut["row"].dim():
                cut["row"] = cut["row"][b : b + 1]
            VectorCase(op, cut).run(ops)
            assert torch.equal(out[b : b + 1].view(BITS[out.dtype]), cut["out"].view(BITS[out.dtype])), (seed, b)


def test_order_of_memory_does_not_matter(ops, isa):
    """The tree follows the logical index, whatever the layouts of sample and vectors."""
    x, basis = vectors(0, 3, 5, 20, 21), vectors(1, 4, 5, 20, 21)
    results = []
    for first in (torch.contiguous_format, torch.channels_last):
        for second in (torch.contiguous_format, torch.channels_last):
            a, b, table = x.contiguous(memory_format=first), basis.contiguous(memory_format=second), torch.ones(1, 4)
            out, h, lifted = torch.zeros(3, 4), a.clone(), torch.empty_like(a)
            ops.project_(out, a, b, None, table, table, None, None, 0)
            ops.lift_(lifted, b, None, out)
            ops.edit_(h, h, b, None, out)
            results.append((out, lifted, h))
    for other in results[1:]:
        assert all(torch.equal(s, t) for s, t in zip(results[0], other))


def test_zero_weights_leave_activations_alone(ops, isa):
    """In place and elsewhere, NaN with their payloads included; the vectors are not read."""
    bits = torch.randint(-(2**31), 2**31 - 1, (2, 3000), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        h = bits.view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype)
        before, out = h.clone(), torch.zeros_like(h)
        nan = torch.full((1, 3000), float("nan"))
        ops.edit_(h, h, nan, None, torch.zeros(2, 1))
        ops.edit_(out, h, nan, torch.full((2, 1), 99), torch.tensor([[-0.0], [0.0]]))
        for t in (h, out):
            assert torch.equal(t.view(BITS[dtype]), before.view(BITS[dtype]))


def test_near_float64(ops, isa):
    """At the sizes that are used, the fixed tree is closer to the truth than the bound of any order needs."""
    x, basis = vectors(0, 4, 3 * 64 * 64), vectors(1, 64, 3 * 64 * 64) / 64
    table, out = torch.ones(1, 64), torch.zeros(4, 64)
    ops.project_(out, x, basis, None, table, 0 * table, None, None, 0)
    assert torch.allclose(out.double(), x.double() @ basis.double().t(), atol=3e-6, rtol=3e-6)
    lifted = torch.empty_like(x)
    ops.lift_(lifted, basis, None, out)
    assert torch.allclose(lifted.double(), out.double() @ basis.double(), atol=1e-5, rtol=1e-5)
    h, weight = x.clone(), torch.full((4, 64), 0.01)
    ops.edit_(h, h, basis, None, weight)
    norm = x.double().norm(dim=1, keepdim=True)
    assert torch.allclose(h.double(), x.double() + norm * (weight.double() @ basis.double()), atol=1e-5, rtol=1e-5)


def test_nothing_to_do(ops, isa):
    table = torch.ones(1, 2)
    for batch, terms in ((0, 2), (3, 0)):
        ops.project_(torch.zeros(batch, terms), torch.ones(batch, 5), torch.ones(2, 5), None, table, table, None, None, 0)
    out = torch.zeros(2, 2)
    ops.project_(out, torch.ones(2, 0), torch.ones(2, 0), None, table, 3 * table, 2 * torch.ones(2, 2), None, 0)
    assert out.tolist() == [[6.0, 6.0]] * 2  # the sum of nothing is 0
    lifted = torch.ones(2, 5)
    ops.lift_(lifted, torch.ones(0, 5), None, torch.zeros(2, 0))
    assert (lifted == 0).all() and np.signbit(lifted.numpy()).all()
    h = torch.ones(2, 5)
    ops.edit_(h, h, torch.ones(0, 5), None, torch.zeros(2, 0))
    assert (h == 1).all()


@pytest.mark.parametrize("index", ["none", "one for all", "by sample"])
@pytest.mark.parametrize("batch", [1, 7, 8, 9, 17])
def test_sums_of_samples_that_share_their_terms(ops, isa, threads, batch, index):
    """Slices of 48 elements, tiles of 8 samples: whole ones, what is left of them, and terms that no sample has."""
    draw = np.random.default_rng(batch)
    for n in (1, 15, 16, 33, 47, 48, 49, 100, 784):
        basis = draw.standard_normal((9, n)).astype(np.float32)
        basis[2, n // 2], basis[3] = np.nan, 0.0
        weight = draw.standard_normal((batch, 11)).astype(np.float32)
        weight[:, [1, 10]], weight[-1, 5] = 0.0, np.inf
        if batch % 2:
            weight[0, 4] = 0.0  # one sample lacks a term
        rows = {"none": None, "one for all": draw.integers(0, 9, (1, 11)).repeat(batch, 0), "by sample": draw.integers(0, 9, (batch, 11))}[index]
        used = weight[:, :9].copy() if rows is None else weight
        out = torch.empty(batch, n)
        ops.lift_(out, torch.from_numpy(basis), None if rows is None else torch.from_numpy(rows), torch.from_numpy(used))
        expected = lift(basis, rows, used)
        assert np.array_equal(out.numpy().view(np.int32), expected.view(np.int32)), n


@pytest.mark.parametrize("op", ["lift_", "project_", "edit_"])
@pytest.mark.parametrize("batch", [1, 8, 16])
def test_weights_below_the_normal_numbers_count_in_every_mode(ops, isa, flushing, op, batch):
    """With denormals flushed they would compare equal to 0, and an index that is not looked at would be read."""
    weight = torch.full((batch, 1), 5, dtype=torch.int32).view(torch.float32)
    basis, out, wrong = torch.full((1, 40), 1e38), torch.empty(batch, 40), torch.full((batch, 1), 10**6)
    one = torch.ones(1, 1)
    flushing(True)
    if op == "lift_":
        ops.lift_(out, basis, None, weight)
    with pytest.raises((RuntimeError, ValueError), match="index|1000000"):
        if op == "lift_":
            ops.lift_(torch.empty(batch, 40), basis, wrong, weight)
        elif op == "edit_":
            ops.edit_(torch.empty(batch, 40), torch.ones(batch, 40), basis, wrong, weight)
        else:
            ops.project_(torch.empty(batch, 1), torch.ones(batch, 40), basis, wrong, one, one, weight, None, 0)
    flushing(False)
    if op == "lift_":
        expected = lift(basis.numpy(), None, weight.numpy())
        assert expected.all() and np.array_equal(out.numpy().view(np.int32), expected.view(np.int32))
