"""quantile_: how many launches it takes, what each leaves to the next, and that the proof of it can fail. That its bits are right is
shown with those of all other kernels (proof.bits)."""

import pytest
import torch

from counter.emulated import LAUNCHES
from fastdiff.kernels.quantile import BINS, PASSES, ROWS
from proof import draw_quantile
from proof.bits import backend
from proof.execute import allocated, execute, prove_quantile
from proof.workloads import LAUNCHES as RECORDED

TRITON = backend("triton")


def simple(case, x, q):
    """The case with one input and one result."""
    case.arguments.update(out=torch.zeros(len(x)), clip=None, inputs=[x], coef=torch.ones(1, 1), row=None, row_index=0, scale=None, q=q)


def record(case):
    recording = TRITON.record(90, "quantile_", *case.args())
    (counts,) = allocated(recording, case.args())
    return recording, counts


def test_launches_are_those_that_are_counted():
    recording, counts = record(draw_quantile.case(0))
    assert len(recording.launches) == PASSES + 1 == LAUNCHES["fastdiff.quantile_"] == RECORDED["quantile_"]
    assert counts.shape[1:] == (ROWS, BINS) and (counts == 0).all()
    assert {one.block for one in recording.launches} == {(32, 1, 1)}, "one warp: see kernels/quantile.py"


def test_counts_are_those_of_the_digits():
    """After each launch, of a sample without NaN: the counts of its digit among the elements that share the digits before."""
    case = draw_quantile.case(0)
    x = torch.randn(2, 4104, generator=torch.Generator().manual_seed(0))
    simple(case, x, 0.5)
    recording, counts = record(case)
    execute(recording, [case.arguments["out"], counts])
    for b in range(2):
        bits, width = x[b].abs().view(torch.int32).long().sort().values, (8, 8, 8, 7)
        for rank, which in ((2051, 0), (2052, 1)):
            there, shift, apart = bits, 31, False
            for number in range(PASSES):
                shift -= width[number]
                digits = there >> shift & 2 ** width[number] - 1
                found = torch.bincount(digits, minlength=BINS)
                assert torch.equal(counts[b, 2 * number + which * apart], found), (b, which, number)
                there = bits[bits >> shift == bits[rank] >> shift]
                apart = bool(bits[2051] >> shift != bits[2052] >> shift)
        assert (counts[b, ROWS - 1] == 0).all()
    assert torch.equal(case.arguments["out"], torch.quantile(x.abs(), 0.5, dim=1))


@pytest.mark.parametrize("number", range(PASSES))
def test_every_launch_is_needed(number):
    """Without one of them something else comes out."""
    case = draw_quantile.case(0)
    x = torch.randn(1, 264, generator=torch.Generator().manual_seed(number))
    simple(case, x, 0.75)
    recording, counts = record(case)
    del recording.launches[number]
    execute(recording, [case.arguments["out"], counts])
    assert not torch.equal(case.arguments["out"], torch.quantile(x.abs(), 0.75, dim=1))


@pytest.mark.parametrize("change", [dict(q=0.123), dict(low=1e30, high=1e30)])
def test_a_wrong_expectation_is_noticed(change, monkeypatch):
    case = draw_quantile.case(3)
    case.arguments.update(q=0.9, clip=torch.zeros(len(case.arguments["inputs"][0]), 3))
    other = case.clone()
    other.arguments.update(change)
    monkeypatch.setattr(case, "expected", other.expected)
    with pytest.raises(AssertionError, match="expected"):
        prove_quantile(case, TRITON, 90)


def test_cases_hold_what_they_promise():
    drawn = [draw_quantile.case(i).arguments for i in range(36)]
    inputs = [t for a in drawn for t in a["inputs"]]
    assert {t.dtype for t in inputs} == {torch.float32, torch.float16, torch.bfloat16}
    sizes = [a["inputs"][0][0].numel() for a in drawn]
    assert all(any(right(n) for n in sizes) for right in (lambda n: n > 4096, lambda n: n % 8, lambda n: n % 8 == 0))
    assert any(t.dim() > 3 and t.stride(1) == 1 and t.shape[1] > 1 for t in inputs), "channels-last"
    assert any(t.isnan().any() for t in inputs)
    for name in ("out", "clip", "row", "scale"):
        assert {a[name] is None for a in drawn} == {True, False}, name
    assert {a["row"].dim() for a in drawn if a["row"] is not None} == {0, 1}
    for i in range(4):
        a = draw_quantile.case(i, clamped=True).arguments
        assert ((a["row"] < 0) | (a["row"] >= len(a["coef"]))).all()
