"""Are the cases able to see a fault? Each instruction of a step kernel is changed in each way that applies to it, and the
cases run until one differs from the reference, stops at an error, or does not end.

    PYTHONPATH=tests python -m proof.mutate              writes tests/proof/mutation.json
    PYTHONPATH=tests python -m proof.mutate --subjects cuda --sample 200 --seed 1

Rounding modifiers are caught by the lint, which takes no other than .rn.
"""

import argparse
import functools
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from cases import assert_same, expected_case
from proof import draw, large, lint, mutants
from proof.bits import backend, label
from proof.execute import memory_of, written
from ptx import Launch, PtxError
from ptx.machine import STEPS

RESULT = Path(__file__).with_name("mutation.json")
SLOWER = 5  # a changed kernel that takes so many times the steps of the real one does not end


class Trial:
    """A case whose launch is recorded and whose memory is laid out once, to be run with one changed kernel after the other."""

    def __init__(self, case, hidden, name, arch):
        """hidden: tensors whose memory is not there."""
        expected = expected_case(case)
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


class LargeTrial(Trial):
    """One block of a sample with more than 2^31 elements."""

    def __init__(self, kind, name, arch, b, first):
        self.case, tokens = large.big_case(kind)
        recording = backend(name).record(arch, "step_", *self.case.args())
        (self.launch,) = recording.launches
        self.memory = memory_of(recording.tensors, written(self.case))
        large.fill(self.case, b, first, large.SPAN, np.random.default_rng(2))
        self.window = b, first, large.SPAN, large.row_of(self.case, b, first, tokens)
        self.expected = expected_case(large.window(self.case, *self.window))
        self.blocks = large.blocks(name, self.launch, b, first, self.case.inputs[0][0].numel(), tokens)
        self.measure()

    def failure(self, launch):
        for y in self.case.outputs:
            large.flat(y)[large.places(y, *self.window[:3])] = 0
        try:
            self.counts = launch.run(self.memory, blocks=self.blocks, steps=self.steps)
            assert_same(large.window(self.case, *self.window), self.expected)
        except (PtxError, AssertionError) as error:
            return str(error)
        return None


# By subject, which begins with the backend: the kernel that is changed (None: the one that the cases launch), its cases, and
# large samples for its 64-bit indices.
SUBJECTS = {"cuda": ("step<4, plain, 3>", draw.plain_case, range(448), ("plain",)),
            "cuda dense": ("step<16, dense, 1>", draw.dense_case, range(720), ()),
            "triton": (None, draw.alike_case, range(200), ())}


def folded(i, make):
    """Every fifth launch of Triton has a grid that is folded as that of many samples."""
    if i % 5 != 4:
        return make()
    from fastdiff.kernels import launch

    with mock.patch.object(launch, "MAX_GRID_Y", 2):
        return make()


def trials(name, arch=90, count=None):
    """Every trial of a subject, or the first ``count``."""
    wanted, make, numbers, large_kinds = SUBJECTS[name]
    name = name.split()[0]
    found = []
    for i in numbers:
        trial = folded(i, functools.partial(Trial, *make(i), name, arch))
        if wanted in (None, label(trial.kernel)):
            found.append(trial)
        if len(found) == count:
            return found
    return found + [LargeTrial(kind, name, arch, 1, 2**32) for kind in large_kinds]


class Hunt:
    """Tries mutants on trials, those that have caught most of them first."""

    def __init__(self, trials):
        self.trials, self.kernel, self.caught = trials, trials[0].kernel, Counter()
        assert all(trial.kernel is self.kernel for trial in trials)
        self.reached = set().union(*(trial.executed for trial in trials))

    def outcome(self, mutant):
        """What a mutant's first trial that notices it sees, or None. Trials that do not come by the instruction are left out."""
        if mutant.kind == "rounding":
            assert lint.faults(mutant.text + ";"), mutant
            return "lint"
        changed = self.kernel.replaced(mutant.index, mutant.text)
        for n in sorted(range(len(self.trials)), key=lambda n: -self.caught[n]):
            if mutant.index in self.trials[n].executed and (failure := self.trials[n].with_kernel(changed)):
                self.caught[n] += 1
                return failure
        return None


# Why a mutant changes nothing that may be seen, by its text: backend or "", pattern of "before -> after", reason. The first
# that fits is taken.
REASONS = [
    ("", r"^ret -> ", "the kernel ends there in any case"),
    ("", r"%nctaid\.y", "a launch has a third dimension beyond 65,535 blocks of samples only"),
    ("", r"^(mov|selp)\.u16 .*\b1\b.* -> .*\b2\b", "a condition: every number but 0 holds"),
    ("", r"-4294967296|^setp\.eq\.s64 .*, 0 -> .*, 1$", "whether numbers are divided in 32 or in 64 bits: the quotient is the same"),
    ("triton", r"^mov\.u(16|32|64) \S+, 0x0 -> ", "a load writes over it; where its guard is false, nothing uses the value"),
    ("triton", r"^or\.b32 |^setp\.lt\.s32 .* -> setp\.le\.s32 ",
     "these samples are whole rows of the tile: the lanes of a row end together"),
    ("triton", r"^min\.s64 .*, 1024 -> ", "no row of the tile lies beyond it"),
    ("triton", r"atom\.global\.gpu\.relaxed\.or|^setp\.eq\.b32 \S+, \S+, 0 -> setp\.(ne|eq)",
     "which threads set a flag of the status, and all set the same; or whether noise without weight is drawn"),
    ("triton", r"^and\.b32 \S+, \S+, 2147483647 -> or", "whether noise without weight is drawn: it is added to nothing"),
    ("cuda", r"^(and\.b32 \S+, \S+, 2147483647 -> or|setp\.gt\.u32 \S+, \S+, 2139095040 -> setp\.gt\.u32)",
     "the last lane of a thread in which a NaN was met: where it is there, all are, and the answer is known"),
    ("cuda", r"^xor\.b32 \S+, \S+, \S+ -> or\.b32|^mov\.b64 \{low, ", "half of a product with 0, in the first round of Philox"),
    ("cuda", r"^setp\.le\.s64 .* -> setp\.lt\.s64 ", "a thread whose first element is the one behind the last owns none"),
    ("cuda", r"^mov\.[ub](32|64) \S+, (0|%\w+) -> ", "the value of a lane beyond the last element, or of a division that is not needed"),
    ("cuda", r"^(ld\.param\.u32 .*\+960\]|min\.s64 .*, 4|setp\.ne\.s32 .*, 4|and\.b32 \S+, \S+, (4096|8192|16384)|shl\.b32|add\.s32|"
             r"mov\.u32 \S+, 1) ", "a vector or its elements one by one: the same bytes are written"),
    ("", r"^and\.b32 \S+, \S+, 2147483647 -> and\.b32",
     "whether a coefficient is 0: every other that is drawn has some of the bits that are left"),
    ("", r"^(fma|add)\.rn\.f32 .*0f", "the last place of this constant moves a few normals, and none of those that are drawn"),
    ("", r"(^|@!?%p\d+ )bra\S* ", "skips what changes nothing: a term of weight 0, a search for NaN where there is none, a longer "
                                 "way to the same bytes"),
]


def reason(name, before, mutant, reached):
    """Why a mutant that no case notices changes nothing; "" where that is not known."""
    if mutant.index not in reached:
        return "no launch comes by: a test is made twice, and the first has dealt with this outcome"
    text = f"{before} -> {mutant.text}"
    return next((why for which, pattern, why in REASONS if which in ("", name.split()[0]) and re.search(pattern, text)), "")


def survey(name, arch=90, sample=None, seed=0, count=None):
    """Plants the mutants of a subject's kernel, or a sample of them: what was caught, and every survivor with its reason."""
    began = time.perf_counter()
    hunt = Hunt(trials(name, arch, count))
    every = mutants.of_kernel(hunt.kernel)
    planted = every if sample is None else random.Random(seed).sample(every, sample)
    total, caught, survivors = Counter(), Counter(), []
    for mutant in planted:
        total[mutant.kind] += 1
        if hunt.outcome(mutant) is None:
            before = hunt.kernel.instructions[mutant.index].text
            survivors.append({"instruction": mutant.index, "kind": mutant.kind, "before": before, "after": mutant.text,
                              "reason": reason(name, before, mutant, hunt.reached)})
        else:
            caught[mutant.kind] += 1
    return {"backend": name, "kernel": label(hunt.kernel), "target": arch, "instructions": len(hunt.kernel.instructions),
            "executed": len(hunt.reached), "cases": len(hunt.trials), "mutants": len(planted),
            "caught": sum(caught.values()), "share": round(sum(caught.values()) / len(planted), 4),
            "by kind": {kind: f"{caught[kind]} of {total[kind]}" for kind in mutants.KINDS},
            "unexplained": sum(not s["reason"] for s in survivors), "seconds": round(time.perf_counter() - began),
            "survivors": survivors}


def keep(path, found):
    """Writes results by subject, and leaves those of other subjects as they are."""
    kept = {r["backend"]: r for r in (*(json.loads(path.read_text()) if path.exists() else []), *found)}
    path.write_text(json.dumps(list(kept.values()), indent=1) + "\n")


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
    return any(r["share"] < 0.95 for r in found)


if __name__ == "__main__":
    sys.exit(main())
