"""Are the cases able to see a fault? Each instruction of a step kernel is changed in each way that applies to it, and the
cases run until one differs from the reference, stops at an error, or does not end.

    PYTHONPATH=tests python -m proof.mutate              writes tests/proof/mutation.json
    PYTHONPATH=tests python -m proof.mutate --subjects cuda --sample 200 --seed 1

Rounding modifiers are caught by the lint, which takes no other than .rn.
"""

import argparse
import dataclasses
import functools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import cases
from cases import assert_same, expected_case
from fastdiff import reference
from proof import aimed, draw, large, lint, mutants, source
from proof.bits import backend, label
from proof.execute import memory_of, written
from proof.reasons import REASONS, UNREACHED
from ptx import Launch, PtxError
from ptx.machine import STEPS

RESULT = Path(__file__).with_name("mutation.json")
ENOUGH = 0.95  # the least share of mutants that the cases must notice
SLOWER = 5  # a changed kernel that takes so many times the steps of the real one does not end


def meant(case):
    """The case without what its rows name and what is not there: ring slots, targets of a mask, its known image and noise term.
    The kernels pass over them; the reference has no answer to them."""
    slots, noises = (0 if t is None else t.shape[d] for d, t in enumerate((case.ring, case.keys)))
    outputs = len(case.outputs)
    meta, coef = case.meta.clone(), case.coef.clone()
    meta[(meta[:, 0] < 0) | (meta[:, 0] >= slots), 0] = -1
    meta[:, 1] &= cases.CLIP if case.mask is None else cases.MASK_Y0 * 2**outputs - 1
    if case.known is None:
        coef[:, -2 * (2 + outputs) :: 2] = 0
    coef[(meta[:, 3] < 0) | (meta[:, 3] >= noises), 1 - 2 * (2 + outputs) :: 2] = 0
    return dataclasses.replace(case, meta=meta, coef=coef)


class Trial:
    """A case whose launch is recorded and whose memory is laid out once, to be run with one changed kernel after the other."""

    def __init__(self, case, hidden, name, arch):
        """hidden: tensors whose memory is not there."""
        expected = expected_case(meant(case))
        recording = backend(name).record_unchecked_step(arch, case)
        (self.launch,) = recording.launches
        gone = {t.data_ptr() for t in hidden}
        self.memory = memory_of(*([t for t in tensors if t.data_ptr() not in gone] for tensors in (recording.tensors, written(case))))
        pairs = {}
        for mine, theirs in zip(written(case), written(expected)):
            mine, theirs = (torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy() for t in (mine, theirs))
            pairs[mine.__array_interface__["data"][0]] = mine, mine.copy(), theirs
        self.pairs = list(pairs.values())
        self.measure()

    def measure(self):
        """Runs the launch as it is: it must pass. What it executes, and in how many steps."""
        self.steps = STEPS
        failure = self.failure(self.launch)
        assert failure is None, failure
        self.steps, self.executed = SLOWER * self.counts.steps, set(self.counts.by_index)

    def failure(self, launch):
        """What is wrong with what this launch does to the case, or None."""
        for mine, before, _ in self.pairs:
            mine[:] = before
        try:
            self.counts = launch.run(self.memory, steps=self.steps)
        except PtxError as error:
            return str(error)
        return None if all(np.array_equal(mine, after) for mine, _, after in self.pairs) else "other bits"

    @property
    def kernel(self):
        return self.launch.kernel

    def with_kernel(self, kernel):
        return self.failure(Launch(kernel, self.launch.grid, self.launch.block, self.launch.params, self.launch.shared))

    def with_parameters(self, parameters):
        return self.failure(Launch(self.launch.kernel, self.launch.grid, self.launch.block, parameters, self.launch.shared))


def with_bank(case):
    """The case of two inputs and one output with a bank that no term takes."""
    place = reference.Layout(2, 1, 0, 1).y(0) + 3
    coef = torch.from_numpy(np.insert(case.coef.numpy(), [2, place], 0, axis=1))
    bank = large.reserved((1, *case.inputs[0].shape[1:]), case.inputs[0].stride(), torch.float32)
    index, weight = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1)
    return dataclasses.replace(case, coef=coef, bank=bank, bank_index=index, bank_weight=weight)


class LargeTrial(Trial):
    """One block of a sample with more than 2^31 elements."""

    def __init__(self, kind, name, arch, b, first):
        self.case, tokens = large.big_case(kind.removeprefix("bank, "))
        given = with_bank(self.case) if kind.startswith("bank") else self.case
        recording = backend(name).record(arch, "step_", *given.args())
        (self.launch,) = recording.launches
        self.memory = memory_of(recording.tensors, written(self.case))
        large.fill(self.case, b, first, large.SPAN, np.random.default_rng(2))
        self.window = b, first, large.SPAN, large.row_of(self.case, b, first, tokens)
        self.expected = expected_case(large.window(self.case, *self.window))
        self.blocks = large.blocks(name, self.launch, b, first, self.case.inputs[0][0].numel(), tokens)
        self.measure()

    def failure(self, launch):
        self.case.status.copy_(torch.tensor([2**31 - 1, 0]))
        for y in self.case.outputs:
            large.flat(y)[large.places(y, *self.window[:3])] = 0
        try:
            self.counts = launch.run(self.memory, blocks=self.blocks, steps=self.steps)
            assert_same(large.window(self.case, *self.window), self.expected)
        except (PtxError, AssertionError) as error:
            return str(error)
        return None


def folded(i, make):
    """Every fifth launch of Triton has a grid that is folded as that of many samples."""
    if i % 5 != 4:
        return make()
    from fastdiff.kernels import launch

    with mock.patch.object(launch, "MAX_GRID_Y", 2):
        return make()


# By subject, which begins with the backend: the kernel that is changed (None: the one that the cases launch), its cases with
# what must not be read, and large samples for its 64-bit indices.
SUBJECTS = {"cuda": ("step<4, plain, 3>", lambda: aimed.cases_of("plain"), ("plain",)),
            "cuda bank": ("step<4, bank, 3>", lambda: aimed.cases_of("bank"), ("bank, plain",)),
            "cuda everything": ("step<4, everything, 3>", lambda: aimed.cases_of("everything"), ("mask", "whole mask", "tokens")),
            "cuda dense": ("step<16, dense, 1>", lambda: aimed.cases_of("dense"), ()),
            "cuda dense float32": ("step<8, dense, 1>", lambda: aimed.cases_of("dense float32"), ()),
            "triton": (None, lambda: map(draw.alike_case, range(200)), ())}


def trials(name, arch=90, count=None):
    """Every trial of a subject, or the first ``count``."""
    wanted, made, large_kinds = SUBJECTS[name]
    name = name.split()[0]
    found = []
    for i, (case, hidden) in enumerate(made()):
        trial = folded(i, functools.partial(Trial, case, hidden, name, arch))
        if wanted in (None, label(trial.kernel)):
            found.append(trial)
        if len(found) == count:
            return found
    return [LargeTrial(kind, name, arch, 1, 2**32) for kind in large_kinds] + found


class Hunt:
    """Tries mutants on trials, those that have caught one last first."""

    def __init__(self, name, trials):
        self.name, self.trials, self.kernel = name, list(trials), trials[0].kernel
        assert all(trial.kernel is self.kernel for trial in trials)
        self.reached = set().union(*(trial.executed for trial in trials))
        there = name.startswith("cuda")
        self.setters = {}
        for one in self.kernel.instructions:
            if found := re.match(r"(?:@!?%p\d+ )?\S+ (%p\d+),", one.text):
                self.setters.setdefault(found[1], []).append(one.text)
        self.lines = source.lines(self.kernel) if there else [""] * len(self.kernel.instructions)

    def reason(self, mutant):
        """Why a mutant that no case notices changes nothing; "" where that is not known."""
        if mutant.index not in self.reached:
            return UNREACHED
        text = self.change(mutant)
        return next((why for which, line, pattern, why in REASONS if which in ("", self.name.split()[0])
                     and re.search(line, self.lines[mutant.index]) and re.search(pattern, text)), "")

    def change(self, mutant):
        """Before and after; where it depends on predicates, how those are made too."""
        before = self.kernel.instructions[mutant.index].text
        return f"{before} -> {mutant.text}" + "".join(f" where {made}" for made in self.made(before, 3))

    def made(self, text, depth):
        """The instructions that make the predicates which an instruction reads, each the only one that does."""
        for name in re.findall(r"%p\d+", text if text.startswith("@") else text.partition(",")[2]) if depth else ():
            if len(made := self.setters.get(name, [])) == 1:
                yield made[0]
                if not made[0].startswith("setp"):
                    yield from self.made(made[0], depth - 1)

    def outcome(self, mutant):
        """What a mutant's first trial that notices it sees, or None. Trials that do not come by the instruction are left out;
        where there is a reason that a mutant changes nothing, a few of them must do."""
        if mutant.kind == "rounding":
            assert lint.faults(mutant.text + ";"), mutant
            return "lint"
        changed = self.kernel.replaced(mutant.index, mutant.text)
        left = FEW if self.reason(mutant) else len(self.trials)
        for n, trial in enumerate(self.trials):
            if mutant.index in trial.executed and left:
                left -= 1
                if failure := trial.with_kernel(changed):
                    self.trials.insert(0, self.trials.pop(n))
                    return failure
        return None


FEW = 40


def survey(name, arch=90, sample=None, seed=0, count=None):
    """Plants the mutants of a subject's kernel, or a sample of them: what was caught, and every survivor with its reason."""
    hunt = Hunt(name, trials(name, arch, count))
    every = mutants.of_kernel(hunt.kernel)
    planted = every if sample is None else random.Random(seed).sample(every, sample)
    total, caught, survivors = Counter(), Counter(), []
    for mutant in planted:
        total[mutant.kind] += 1
        if hunt.outcome(mutant) is None:
            before = hunt.kernel.instructions[mutant.index].text
            survivors.append({"instruction": mutant.index, "kind": mutant.kind, "before": before, "after": mutant.text,
                              "line": hunt.lines[mutant.index], "reason": hunt.reason(mutant)})
        else:
            caught[mutant.kind] += 1
    return {"backend": name, "kernel": label(hunt.kernel), "target": arch, "instructions": len(hunt.kernel.instructions),
            "executed": len(hunt.reached), "cases": len(hunt.trials), "mutants": len(planted),
            "caught": sum(caught.values()), "share": round(sum(caught.values()) / len(planted), 4),
            "by kind": {kind: f"{caught[kind]} of {total[kind]}" for kind in mutants.KINDS},
            "unexplained": sum(not s["reason"] for s in survivors), "survivors": survivors}


def keep(path, found):
    """Writes results by subject, and leaves those of other subjects as they are."""
    kept = {r["backend"]: r for r in (*(json.loads(path.read_text()) if path.exists() else []), *found)}
    order = [*SUBJECTS, *kept]
    path.write_text(json.dumps(sorted(kept.values(), key=lambda r: order.index(r["backend"])), indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--sample", type=int, help="so many mutants, drawn; the result is printed and not kept")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = [survey(name, sample=given.sample, seed=given.seed) for name in given.subjects]
    if given.sample is None:
        keep(RESULT, found)
    for r in found:
        print({k: v for k, v in r.items() if k != "survivors"})
        for s in r["survivors"]:
            print(f"  {s['kind']} {s['instruction']}: {s['before']} -> {s['after']}: {s['reason'] or '?'}")
    return any(r["share"] < ENOUGH or r["unexplained"] for r in found)


if __name__ == "__main__":
    sys.exit(main())
