"""The ops on vectors: how many launches they take, and that the proof of them can fail. That their bits are right is shown with
those of all other kernels (proof.bits)."""

import pytest
import torch

from counter.emulated import LAUNCHES
from proof import draw_steering
from proof.bits import BACKENDS, backend
from proof.execute import allocated, execute, prove_vectors
from proof.workloads import LAUNCHES as RECORDED
from ptx import PtxError


def served(name, op):
    if op not in backend(name).OPS:
        pytest.skip(f"{name}, {op}: {backend(name).NOT_PROVED[op]}")


@pytest.mark.parametrize("op", draw_steering.OPS)
@pytest.mark.parametrize("name", BACKENDS)
def test_launches_are_those_that_are_counted(name, op):
    """By the launchers themselves: what tests/counter takes for granted."""
    served(name, op)
    recording = backend(name).record(90, op, *draw_steering.case(op, 1))
    assert len(recording.launches) == LAUNCHES.get(f"fastdiff.{op}", 1) == RECORDED.get(op, 1)
    assert all(one.shared == 0 for one in recording.launches)


def edit(name):
    """(recording, out, expected): h + 2 |h| v with |h| = 4"""
    served(name, "edit_")
    h, out = torch.full((1, 16), 1.0), torch.zeros(1, 16)
    bank, weight = torch.arange(16.0).reshape(1, 16), torch.full((1, 1), 2.0)
    return backend(name).record(90, "edit_", out, h, bank, None, weight), out, h + 8 * bank, (out, h, bank, weight)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_second_launch_reads_what_the_first_has_written(name):
    recording, out, expected, args = edit(name)
    (sums,) = allocated(recording, args)
    sums.fill_(float("nan"))
    execute(recording, [out, sums])
    assert torch.equal(out, expected) and sums.item() == 16
    sums.fill_(4)  # the first launch left out, and another norm in its place
    execute(recording._replace(launches=recording.launches[1:]), [out, sums])
    assert torch.equal(out, args[1] + 4 * args[2])
    with pytest.raises(PtxError, match="read-only"):
        execute(recording, [out])


@pytest.mark.parametrize("op", draw_steering.OPS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_wrong_expectation_is_noticed(name, op, monkeypatch):
    """A case whose reference is told other weights."""
    served(name, op)
    args = list(draw_steering.case(op, 2))
    at = 6 if op == "project_" else len(args) - 1

    def other(case_op, given):
        given = list(given)
        given[at] = given[at] + 1
        return given

    monkeypatch.setattr(draw_steering, "within", other)
    with pytest.raises(AssertionError, match="differ"):
        prove_vectors(backend(name), 90, op, args, checked=False)


@pytest.mark.parametrize("op", draw_steering.OPS)
def test_cases_hold_what_they_promise(op):
    """Every kind of sample in twelve, sizes that are not whole vectors, samples without a term, indices outside their tables."""
    drawn = [draw_steering.case(op, i) for i in range(24)]
    samples = [args[1 if op == "project_" else 0] for args in drawn]
    assert {t.dtype for t in samples} == ({torch.float32} if op == "lift_" else {torch.float32, torch.float16, torch.bfloat16})
    assert any(t.stride(-1) != 1 and t.shape[-1] > 1 for t in samples if t.dim() > 3), "channels-last"
    sizes = [t[0].numel() for t in samples]
    assert any(n % 8 for n in sizes) and any(n % 512 == 0 for n in sizes) and any(n > 2048 for n in sizes)
    weights = [args[6 if op == "project_" else -1] for args in drawn]
    assert any((w == 0).all(1).any() for w in weights if w is not None and w.numel())
    clamped = [draw_steering.case(op, i, clamped=True) for i in range(12)]
    at, vectors = {"edit_": (3, 2), "lift_": (2, 1), "project_": (3, 2)}[op]
    assert any((args[at] < 0).any() or (args[at] >= len(args[vectors])).any() for args in clamped if args[at] is not None)
