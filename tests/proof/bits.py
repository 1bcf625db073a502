"""Every GPU kernel, compiled for every target, executed without a GPU and compared with the exact reference in every bit.

    PYTHONPATH=tests python -m proof.bits --targets 80 90 100 --cases 72        prints JSON

A result is {"backend", "kernel", "target", "dtype", "cases", "equal"}: of so many cases that launched this kernel, how many
gave the reference's bits. What failed is under "failures", by case.
"""

import argparse
import importlib
import json
import re
import sys
from collections import defaultdict

import torch

from cases import DTYPES
from proof import draw, draw_quantile, draw_steering
from proof.execute import prove, prove_quantile, prove_step, prove_vectors

BACKENDS, TARGETS = ("cuda", "triton"), (80, 90, 100)
FEATURES = ("plain", "bank", "everything", "dense")


def backend(name):
    """The module that records the launches of a backend."""
    return importlib.import_module(f"proof.{name}_launches")


def label(kernel):
    """A kernel's name as people read it: step<4 elements, bank, 3 outputs>."""
    if found := re.search(r"step_kernelILi(\d+)E\w*?FeaturesE(\d)ELi(\d)E", kernel.name):
        return f"step<{found[1]}, {FEATURES[int(found[2])]}, {found[3]}>"
    if found := re.search(r"(normal|edit)_kernelILi(\d+)E\w*?FeaturesE(\d)E", kernel.name):
        return f"{found[1]}<{found[2]}, {FEATURES[int(found[3])]}>"
    if found := re.search(r"squares_kernelILi(\d)E", kernel.name):
        return f"squares<{found[1]}>"
    return re.search(r"([a-z_]+)_kernel", kernel.name)[1]


def tasks(cases, first=0):
    """(name, dtype, task) of all that is to be shown; task(backend, arch) raises where something differs, and returns the recording.
    cases: how many of step_; a third as many of each op on vectors and of normal_ in each dtype, a sixth of quantile_, an eighth of the
    rest."""

    def step(i):
        return lambda backend, arch: prove_step(draw.step_case(i), backend, arch)

    def clamped(i):
        return lambda backend, arch: prove_step(draw.clamped_case(i), backend, arch, checked=False)

    def normal(i, dtype):
        def task(backend, arch):
            out, keys, expected = draw.normal_case(i, dtype)
            return prove(backend, arch, expected, "normal_", out, keys, out=out)

        return task

    def key(op, args, expected):
        return lambda backend, arch: prove(backend, arch, torch.from_numpy(expected), op, *args)

    def vectors(op, i, checked=True):
        def task(backend, arch):
            return prove_vectors(backend, arch, op, draw_steering.case(op, i, not checked), checked)

        return f"{op} {i}" if checked else f"{op} clamped {i}", draw_steering.dtype_of(op, draw_steering.case(op, i, not checked)), task

    def quantile(i, checked=True):
        return lambda backend, arch: prove_quantile(draw_quantile.case(i, not checked), backend, arch, checked)

    for i in range(first, first + -(-cases // 6)):
        yield f"quantile_ {i}", draw_quantile.dtype_of(draw_quantile.case(i)), quantile(i)
        if i % 6 == 0:
            yield f"quantile_ clamped {i}", draw_quantile.dtype_of(draw_quantile.case(i, True)), quantile(i, False)
    for i in range(first, first + -(-cases // 3)):
        for op in draw_steering.OPS:
            yield vectors(op, i)
            if i % 6 == 0:
                yield vectors(op, i, checked=False)
    for i in range(first, first + cases):
        yield f"step_ {i}", draw.dtype_of(draw.step_case(i)), step(i)
    for i in range(first, first + -(-cases // 8)):
        yield f"step_ clamped {i}", draw.dtype_of(draw.clamped_case(i)), clamped(i)
        for n, (op, args, expected) in enumerate(draw.key_cases(i)):
            yield f"{op} {i} {n}", "int64", key(op, args, expected)
    for i in range(first, first + -(-cases // 3)):
        for dtype in DTYPES:
            yield f"normal_ {i} {dtype}", dtype, normal(i, dtype)


def results(backends=BACKENDS, targets=TARGETS, cases=72, first=0, keep=lambda name: True):
    """[{"backend", "kernel", "target", "dtype", "cases", "equal", "failures"}]"""
    found = defaultdict(lambda: [0, 0, {}])
    for name, dtype, task in tasks(cases, first):
        if not keep(name):
            continue
        for backend_name in backends:
            if name.split()[0] not in backend(backend_name).OPS:
                continue
            for arch in targets:
                try:
                    kernels, failure = {label(one.kernel) for one in task(backend(backend_name), arch).launches}, None
                except Exception as error:
                    kernels = {label(error.kernel) if hasattr(error, "kernel") else name.split()[0].rstrip("_")}
                    failure = f"{type(error).__name__}: {error}"
                for kernel in kernels:
                    entry = found[backend_name, kernel, arch, dtype]
                    entry[0] += 1
                    entry[1] += failure is None
                    if failure:
                        entry[2][name] = failure
    return [dict(zip(("backend", "kernel", "target", "dtype", "cases", "equal", "failures"), (*key, *entry)))
            for key, entry in sorted(found.items())]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", type=int, default=TARGETS)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--cases", type=int, default=72)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    found = results(given.backends, given.targets, given.cases, given.first)
    print(json.dumps(found, indent=1))
    return any(r["cases"] != r["equal"] for r in found)


if __name__ == "__main__":
    sys.exit(main())
