"""``make gpu-proof``: everything that is shown about the GPU kernels without a GPU, in one table.

    PYTHONPATH=tests python -m proof.table            some minutes on two cores
    PYTHONPATH=tests python -m proof.table --cases 24 --targets 90 --out FILE

Every kernel of both backends, compiled for each target, is run in the PTX executor on the cases of proof.draw and compared with
the exact reference in every bit; and measured on the launches of proof.workloads, and compared with its budget. Writes
benchmarks/results/gpu_proof.json. Exit code 1 if a bit differs or a budget is exceeded.
"""

import argparse
import json
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from fastdiff.files import written
from proof import bits, budgets
from proof.roofline import predict
from proof.workloads import workloads

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "gpu_proof.json"
PIECE = 24  # cases of a task
MORE = {"cuda": 4}  # times as many cases: they cost no compilation, and are spread over more kernels


def task(what, *args):
    """One piece of the work, in a process of its own: ("bits" | "budgets" | "compiled", what was found)."""
    torch.set_num_threads(1)
    if what == "bits":
        name, arch, cases, first = args
        return what, bits.results([name], [arch], cases, first)
    if what == "compiled":
        return what, {f"sm_{args[0]}": budgets.compiled(args[0])}
    return what, budgets.measure(*args)


def tasks(backends, targets, cases):
    for name in backends:
        for arch in targets:
            all_ = cases * MORE.get(name, 1)
            for first in range(0, all_, PIECE):
                yield "bits", name, arch, min(PIECE, all_ - first), first
    yield from (("budgets", *args) for args in budgets.tasks(backends, targets))
    if "cuda" in backends:
        yield from (("compiled", arch) for arch in targets)


def found(backends, targets, cases, workers, console):
    """(results of proof.bits, rows of the budgets, resources of the CUDA kernels), everything in processes."""
    together, rows, kernels = defaultdict(lambda: {"cases": 0, "equal": 0, "failures": {}}), {}, {}
    every = list(tasks(backends, targets, cases))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, Progress(console=console) as progress:
        bar = progress.add_task("proving", total=len(every))
        for done in as_completed([pool.submit(task, *one) for one in every]):
            what, result = done.result()
            progress.advance(bar)
            if what == "bits":
                for r in result:
                    entry = together[r["backend"], r["kernel"], r["dtype"], f"sm_{r['target']}"]
                    entry["cases"] += r["cases"]
                    entry["equal"] += r["equal"]
                    entry["failures"] |= r["failures"]
            else:
                (kernels if what == "compiled" else rows).update(result)
    return dict(together), rows, kernels


def lines(proved, rows, kernels, targets):
    """[{"backend", "kernel", "dtype", "case", "targets": {target: {"cases", "equal", **budgets}}, "predicted"}]: by backend one
    line for each launch that has a budget, then one for each kernel and dtype that has none."""
    out, shown = [], set()
    order = list(workloads())
    launches = sorted({(backend, case) for backend, _, case in rows}, key=lambda k: (k[0], order.index(k[1])))
    for backend, case in launches:
        by_target = {t: rows[backend, t, case] for t in targets if (backend, t, case) in rows}
        kernel = next(iter(by_target.values()))["kernel"]
        dtype = dtype_of(case)
        shown.add((backend, kernel, dtype))
        out.append({"backend": backend, "kernel": kernel, "dtype": dtype, "case": case,
                    "targets": {t: {**_proof(proved, backend, kernel, dtype, t), **row} for t, row in by_target.items()}})
        if "sm_90" in by_target:
            p = predict(by_target["sm_90"])
            out[-1]["predicted"] = {"share_of_roofline": round(p.share, 3),
                                    "launch_bound_below_elements": round(p.launch_bound)}
    for backend, kernel, dtype in sorted({key[:3] for key in proved} - shown):
        used = kernels if backend == "cuda" else {}
        out.append({"backend": backend, "kernel": kernel, "dtype": dtype, "case": None, "targets": {
            t: {**_proof(proved, backend, kernel, dtype, t), **used.get(t, {}).get(kernel, {})} for t in targets}})
    return sorted(out, key=lambda line: line["backend"])


def dtype_of(case):
    """As proof.bits names the dtype of a case."""
    return "mixed" if case.startswith("mixed") else case.rsplit(", ", 1)[1]


def _proof(proved, *key):
    entry = proved.get(key, {"cases": 0, "equal": 0})
    return {"cases": entry["cases"], "equal": entry["equal"]}


def show(found_lines, targets, console):
    names = "/".join(t[3:] for t in targets)
    table = Table(title=f"GPU kernels for sm_{names}, proven without a GPU", header_style="bold",
                  caption="bytes, PTX and SASS: for each element, on sm_90.   * Predicted for an H100, never measured: "
                          "max(bytes / bandwidth, issue slots / rate, a launch)")
    for heading in ("backend", "kernel", "dtype", "launch"):
        table.add_column(heading, no_wrap=True)
    for heading in ("bits\nequal", f"registers\n{names}", "spills", "bytes", "PTX", "SASS", "share of\nroofline *",
                    "a launch\nbelow *"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for line in found_lines:
        at = [line["targets"][t] for t in targets if t in line["targets"]]
        if before not in (None, line["backend"]):
            table.add_section()
        before = line["backend"]
        equal = "/".join(str(sum(r[k] for r in at)) for k in ("equal", "cases"))
        wrong = any(r["equal"] != r["cases"] for r in at)
        sm_90, p = line["targets"].get("sm_90", {}), line.get("predicted")
        first = sm_90 or at[0]
        registers = [str(r["registers"]) for r in at if "registers" in r]
        spilled = [r["spills"] for r in at if "spills" in r]
        table.add_row(line["backend"], line["kernel"], line["dtype"], (line["case"] or "-").rsplit(", ", 1)[0],
                      equal, "/".join(registers) or "-", str(max(spilled)) if spilled else "-",
                      f"{first['loaded'] + first['stored']:.3g}" if "loaded" in first else "-",
                      f"{first['ptx']:.1f}" if "ptx" in first else "-", f"{first['sass']:.1f}" if "sass" in first else "-",
                      f"{p['share_of_roofline']:.0%}" if p else "-", _thousands(p["launch_bound_below_elements"]) if p else "-",
                      style="bold red" if wrong else None)
    console.print(table)


def _thousands(n):
    return f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} k"


def report(proved, rows, kernels, targets, console):
    """Prints the table and what is wrong, and returns it as it is written."""
    exceeded = [*budgets.compared(rows, budgets.kept()), *budgets.compared_kernels(kernels, budgets.kept())]
    every = lines(proved, rows, kernels, targets)
    show(every, targets, console)
    failures = [(*key, case, text) for key, entry in proved.items() for case, text in entry["failures"].items()]
    for *key, case, text in failures:
        console.print(f"[bold red]bits differ[/]: {', '.join(key)}, {case}: {escape(text)}", highlight=False)
    for what, problem in exceeded:
        console.print(f"[bold red]over budget[/]: {what}: {problem}", highlight=False)
    cases, equal = (sum(entry[k] for entry in proved.values()) for k in ("cases", "equal"))
    console.print(f"{equal:,} of {cases:,} executions gave the reference's bits; {len(exceeded)} figures of {len(rows)} launches "
                  "are over budget. Shown: the code that the compilers emit, run in the PTX executor as it would be launched. "
                  "Not shown: ptxas from PTX to machine code, timings, any real GPU: none was used.")
    return {"command": "make gpu-proof", "versions": budgets.versions(), "gpu": None, "executions": cases, "equal": equal,
            "failures": failures, "over_budget": exceeded, "predicted": "for an H100 SXM, never measured", "rows": every}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", type=int, default=bits.TARGETS)
    parser.add_argument("--backends", nargs="+", default=bits.BACKENDS, choices=bits.BACKENDS)
    parser.add_argument("--cases", type=int, default=72)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    console = Console(width=max(150, Console().width))
    targets = [f"sm_{arch}" for arch in given.targets]
    result = report(*found(given.backends, given.targets, given.cases, given.workers, Console(stderr=True)), targets, console)
    with written(given.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    return bool(result["failures"] or result["over_budget"])


if __name__ == "__main__":
    sys.exit(main())
