"""Planted faults are noticed: a sample of the mutants here, all of them by ``python -m proof.mutate`` and
``proof.parameters``."""

import json

import pytest

from proof import mutants, mutate, parameters, reasons


@pytest.mark.parametrize("name, cases", [("cuda", 60), ("cuda dense", 40), ("triton", 24)])
def test_instructions(name, cases):
    """Of 40 mutants, few survive the first cases."""
    found = mutate.survey(name, sample=40, seed=3, count=cases)
    assert found["mutants"] == 40 and found["caught"] >= 34, found


def test_parameters():
    found = parameters.survey("triton", sample=12, seed=3, count=12)
    assert found["caught"] >= 0.9 * found["changes"] > 20, found


@pytest.mark.parametrize("name", list(mutate.SUBJECTS))
def test_every_kind_of_mutant_is_planted(name):
    kernel = mutate.trials(name, count=1)[0].kernel
    every = mutants.of_kernel(kernel)
    assert {m.kind for m in every} == set(mutants.KINDS)
    changed = {m.index for m in every}
    left = {one.name for n, one in enumerate(kernel.instructions) if n not in changed}
    assert len(changed) > 0.9 * len(kernel.instructions), left
    assert all(m.text != kernel.instructions[m.index].text for m in every)
    for m in every[:: 1 + len(every) // 1000]:
        if m.kind != "rounding":
            kernel.replaced(m.index, m.text)


def test_what_was_kept():
    """mutation.json and parameters.json, as they were written last: every subject is there, nearly all is noticed, and what is
    not has a reason that is still in the list of reasons."""
    kept = json.loads(mutate.RESULT.read_text())
    assert [found["backend"] for found in kept] == list(mutate.SUBJECTS)
    known = {reasons.UNREACHED, *(why for *_, why in reasons.REASONS)}
    for found in kept:
        assert found["share"] >= mutate.ENOUGH, found["backend"]
        assert len(found["survivors"]) == found["mutants"] - found["caught"], found["backend"]
        assert found["unexplained"] == 0
        assert not (left := [s for s in found["survivors"] if s["reason"] not in known]), left
    for found in json.loads(parameters.RESULT.read_text()):
        assert all(s["reason"] for s in found["survivors"]), found["survivors"]
