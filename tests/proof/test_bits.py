"""A part of ``python -m proof.bits``: every kernel for sm_90, a few for the other targets."""

import pytest
import torch

from cases import expected_case
from proof.bits import backend, label, results
from proof.draw import step_case
from proof.execute import execute, prove_step
from ptx import PtxError

def failures(found):
    return {(r["kernel"], name): text for r in found for name, text in r["failures"].items()}


@pytest.mark.parametrize("name, cases", [("cuda", 72), ("triton", 20)])
def test_sm_90(name, cases):
    found = results([name], [90], cases)
    assert failures(found) == {} and all(r["cases"] == r["equal"] > 0 for r in found)
    every = {"step", "normal", "project", "lift", "squares", "edit", "count", "quantile", "fold_in", "run_keys", "raw_words"}
    if name == "cuda":
        every = {label(kernel) for kernel in backend(name).kernels(90).values()}
    assert {r["kernel"] for r in found} == every, "a kernel that no case launches"


@pytest.mark.parametrize("name, cases", [("cuda", 18), ("triton", 4)])
@pytest.mark.parametrize("arch", [80, 100])
def test_other_targets(name, arch, cases):
    assert failures(results([name], [arch], cases, first=72 + arch)) == {}


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_wrong_expectation_is_noticed(name):
    """The proof can fail: a case whose reference is told other coefficients."""
    case = step_case(11)
    other = case.clone()
    other.coef *= 2
    with pytest.raises(AssertionError, match="expected"):
        prove_step(case, backend(name), 90, expected=expected_case(other))


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("what", ["read", "written"])
def test_memory_ends_with_the_tensor(name, what):
    """A launch whose tensor lacks the bytes of one element is stopped, and so is one that writes what it may not."""
    out, keys = torch.zeros(2, 37), torch.zeros(2, 2, dtype=torch.int64)
    recording = backend(name).record(90, "normal_", out, keys)
    if what == "written":
        with pytest.raises(PtxError, match="read-only"):
            execute(recording, [])
    recording.tensors[:] = [out[:, :36], keys] if what == "written" else [out, keys[:, :1]]
    with pytest.raises(PtxError, match="out of bounds|outside"):
        execute(recording, [out[:, :36] if what == "written" else out])
