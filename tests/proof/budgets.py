"""What each GPU kernel may cost, by case and target, measured without a GPU: tests/budgets.json.

    PYTHONPATH=tests python -m proof.budgets            compares; exit code 1 where something got worse
    PYTHONPATH=tests python -m proof.budgets --write    writes the file anew; the diff is what is reviewed

A row is one launch as it is recorded (proof.workloads), run in the PTX executor, and what the compiler made of its kernel:

    registers, stack, spills, shared, barriers   of a thread; bytes of stack; accesses to local memory; bytes a block; in the PTX
    loaded, stored      bytes an element that threads ask for of the tensors that have a value for each element
    table               bytes an element, in 32-byte sectors a warp, of all else: coefficients, keys, indices
    sectors             32-byte sectors that warps touch of those tensors, over those that must be touched once
    width               bytes of the narrowest access to them (more is better)
    divergent           branches that split a warp
    ptx                 PTX instructions executed an element
    sass, double        on sm_90: machine instructions executed an element (proof.sass), and how many of them are
                        multiplications to 64 bits, which take two cycles; agreeing: how sure that is

and "compiled" has registers, stack, spills and shared memory of every CUDA kernel. Rounded to three digits behind the point.
The compilers are named in the file: budgets are for them.
"""

import argparse
import functools
import importlib.metadata
import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from rich.console import Console
from rich.progress import track

import cuda_build
import ptx.machine
from fastdiff.files import written
from proof import sass
from proof.bits import BACKENDS, TARGETS, backend, label
from proof.execute import allocated, execute
from proof.workloads import LAUNCHES, workloads
from ptx import Counts

FILE = Path(__file__).resolve().parents[1] / "budgets.json"
SLACK = {"ptx": 0.02, "sass": 0.02, "double": 0.02, "table": 0.02}  # of what moves with the compiler's mood
MORE_IS_BETTER = ("width",)
SASS_TARGET = 90


class Traffic(Counts):
    """Counts that keep where each access to global memory went."""

    def __init__(self):
        super().__init__()
        self.accesses = []

    def add_access(self, what, space, width, addresses, warps):
        super().add_access(what, space, width, addresses, warps)
        if space == "global":
            self.accesses.append((what, width, np.broadcast_to(addresses, len(warps)), warps))


def traffic(counts, tensors):
    """(bytes loaded, bytes stored, sectors, least sectors, narrowest access) of these tensors, sectors of all else."""
    ranges = [(t.untyped_storage().data_ptr(), t.untyped_storage().data_ptr() + t.untyped_storage().nbytes()) for t in tensors]
    loaded = stored = sectors = table = 0
    touched, widths = {"ld": [], "st": []}, set()
    for what, width, addresses, warps in counts.accesses:
        mine = np.zeros(len(addresses), bool)
        for low, high in ranges:
            mine |= (addresses >= low) & (addresses < high)
        for chosen in (mine, ~mine):
            lines = addresses[chosen] >> np.uint64(5)
            some = len(np.unique(np.stack([lines, warps[chosen].astype(np.uint64)]), axis=1).T) if len(lines) else 0
            if chosen is not mine:
                table += some
            elif some:
                sectors += some
                touched[what].append(lines)
                widths.add(width)
        loaded += width * int(mine.sum()) * (what == "ld")
        stored += width * int(mine.sum()) * (what == "st")
    least = sum(len(np.unique(np.concatenate(lines))) for lines in touched.values() if lines)
    return loaded, stored, sectors, least, min(widths), table


@functools.cache
def cuda_code(arch, annotated):
    """({kernel: SASS}, {kernel: resources}) of the CUDA kernels. annotated: with the line of the PTX that each is made from."""
    folder = cuda_build.compiled(arch)
    if annotated:
        assembler = cuda_build.nvcc().parent / "ptxas"

        def build(to):
            for unit in cuda_build.UNITS:
                cuda_build._run([assembler, f"-arch=sm_{arch}", "-lineinfo", folder / f"{unit}.ptx", "-o", to / f"{unit}.cubin"])

        annotated = cuda_build.kept(f"lines_{arch}", build, str(assembler))
    bodies, used = {}, {}
    for unit in cuda_build.UNITS:
        cubin = (folder / f"{unit}.cubin").read_bytes()
        used |= sass.resources(cubin)
        bodies |= sass.read((annotated / f"{unit}.cubin").read_bytes() if annotated else cubin)
    return bodies, used


def code(name, launch, arch):
    """(SASS, resources) of the kernel of a launch."""
    if name == "cuda":
        bodies, used = cuda_code(arch, arch == SASS_TARGET)
        return bodies[launch.kernel.name], used[launch.kernel.name]
    cubin = backend(name).compiled(launch)[1]
    return sass.read(cubin)[launch.kernel.name], sass.resources(cubin)[launch.kernel.name]


def compiled(arch):
    """{kernel: {"registers", "stack", "spills", "shared"}} of every CUDA kernel."""
    bodies, used = cuda_code(arch, arch == SASS_TARGET)
    return {label(kernel): _resources(bodies[name], used[name]) for name, kernel in sorted(backend("cuda").kernels(arch).items())}


def _resources(body, used):
    return {"registers": used["REG"], "stack": used["STACK"], "spills": sass.spills(body), "shared": used["SHARED"]}


def measured(name, case, arch):
    """The row of a backend, a case of ``workloads`` and a target."""
    w = workloads()[case]()
    recording = backend(name).record(arch, w.op, *w.args)
    assert len(recording.launches) == LAUNCHES.get(w.op, 1)
    launch, outputs = recording.launches[w.launch], [] if recording.result is None else [recording.result]
    with mock.patch.object(ptx.machine, "Counts", Traffic):
        counts = execute(recording, [*w.written, *outputs, *allocated(recording, w.args)])[w.launch]
    body, used = code(name, launch, arch)
    elements = w.elements or recording.result.numel()
    loaded, stored, sectors, least, width, table = traffic(counts, [*w.tensors, *outputs])
    used = _resources(body, used)
    used["shared"] = max(used["shared"], launch.shared)  # Triton's is dynamic
    row = {
        "kernel": label(launch.kernel), **used,
        "barriers": sum(i.opcode in ("bar", "barrier") for i in launch.kernel.instructions),
        "loaded": loaded / elements, "stored": stored / elements, "table": 32 * table / elements, "sectors": sectors / least,
        "width": width, "divergent": counts.divergent_branches, "ptx": counts.total / elements,
    }
    if arch == SASS_TARGET:
        threads = int(np.prod(launch.grid) * np.prod(launch.block))
        ran = sass.executed(body, sass.by_line(launch.kernel, counts), threads)
        row |= {"sass": ran.instructions / elements, "double": ran.double / elements, "agreeing": ran.agreeing}
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def worse(row, budget):
    """What of a row is worse than its budget: ["registers: 40, 32 budgeted (8 more, 25.0%)"]"""
    found = []
    for key, most in budget.items():
        have = row.get(key)
        if key == "kernel":
            if have != most:
                found.append(f"kernel: {have}, {most} is budgeted")
        elif key != "agreeing":
            off = most - have if key in MORE_IS_BETTER else have - most
            if off > SLACK.get(key, 0) * most + 0.0005:
                share = f", {off / most:.1%}" if most else ""
                found.append(f"{key}: {have:g}, {most:g} budgeted ({off:g} {'less' if key in MORE_IS_BETTER else 'more'}{share})")
    return found


def versions():
    """What the budgets are for."""
    found = cuda_build._run([cuda_build.nvcc(), "--version"])
    return {"nvcc": re.search(r"release [\d.]+, V([\d.]+)", found)[1], "triton": importlib.metadata.version("triton")}


def kept():
    """What is in the file."""
    return json.loads(FILE.read_text())


def same_compilers():
    """Skips a test where the compilers are not those that the budgets are for."""
    if (found := versions()) != kept()["versions"]:
        pytest.skip(f"the budgets are for {kept()['versions']}, here is {found}: make budgets writes them anew")


def compared(rows, budgets):
    """[(what is measured, what is worse)] of rows by backend, target and case."""
    found = []
    for key, row in rows.items():
        name, target, case = key
        budget = budgets["launches"].get(name, {}).get(target, {}).get(case)
        problems = ["no budget is written for it"] if budget is None else worse(row, budget)
        found += [(f"{name}, {target}, {case}", problem) for problem in problems]
    return found


def compared_kernels(found, budgets):
    """The same of the CUDA kernels' resources by target."""
    problems = []
    for target, kernels in found.items():
        for kernel, row in kernels.items():
            budget = budgets["compiled"].get(target, {}).get(kernel)
            these = ["no budget is written for it"] if budget is None else worse(row, budget)
            problems += [(f"cuda, {target}, {kernel}", problem) for problem in these]
    return problems


def measure(name, arch, cases):
    """{(backend, target, case): row} of several cases; one task of a process."""
    return {(name, f"sm_{arch}", case): measured(name, case, arch) for case in cases}


def tasks(backends=BACKENDS, targets=TARGETS, parts=2):
    """Arguments of ``measure`` for everything, in pieces that processes share."""
    return [(name, arch, list(workloads(backend(name).OPS))[part::parts])
            for name in backends for arch in targets for part in range(parts)]


def write(rows, compiled_):
    """Writes the file. rows, compiled_: of everything, as ``measure`` and ``compiled`` give them."""
    launches = {}
    for (name, target, case), row in rows.items():
        launches.setdefault(name, {}).setdefault(target, {})[case] = row
    order = list(workloads())

    def lines(rows, by=None):
        return ",\n".join(f"    {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows, key=by))

    def targets(found, by=None):
        return ",\n".join(f'  "{target}": {{\n{lines(found[target], by)}\n  }}' for target in found)

    parts = ",\n".join(f'"{name}": {{\n{targets(launches[name], order.index)}\n}}' for name in sorted(launches))
    text = (f'{{\n"versions": {json.dumps(versions())},\n"compiled": {{\n{targets(compiled_)}\n}},\n'
            f'"launches": {{\n{parts}\n}}\n}}\n')
    json.loads(text)
    with written(FILE) as temporary:
        temporary.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write tests/budgets.json")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    rows = {}
    with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        for found in track(pool.map(measure, *zip(*tasks())), "measuring", total=len(tasks()), console=Console(stderr=True)):
            rows |= found
    kernels = {f"sm_{arch}": compiled(arch) for arch in TARGETS}
    if given.write:
        write(rows, kernels)
        return 0
    found = [*compared(rows, kept()), *compared_kernels(kernels, kept())]
    for what, problem in found:
        print(f"{what}: {problem}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
