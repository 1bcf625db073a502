"""fastdiff selftest: every backend of this machine against the golden digests, as a table and as JSON."""

import hashlib
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import ops
from .files import check_target, written
from .testing import Report, run
from .testing.digests import golden as golden_digests
from .testing.timing import Peak, Timing, device_facts, peak

__all__ = ["selftest"]

FORMAT = 1
_GROUPS = {"raw_words": "words and keys", "fold_in": "words and keys", "run_keys": "words and keys", "normal_": "normals",
           "step_": "steps", "project_": "vectors", "lift_": "vectors", "edit_": "vectors",
           "quantile_": "quantiles", "sampler": "samplers"}  # fmt: skip


def selftest(device: str | None = None, backend: str | None = None, *, report_to: str | os.PathLike | None = None,
             verbose: bool = False, golden: str | os.PathLike | None = None) -> bool:
    """Runs the golden cases and prints what came out. Returns whether all that ran agree.

    device: "cpu", "cuda", "cuda:1" or None for all; backend: one name, or None for all; report_to: file for the JSON that
    goes with a report; verbose: a line for each case; golden: folder of other digests. Raises ``ValueError`` for a name
    that is not known, a backend of another device, or a file that cannot be written, before anything runs.
    """
    if report_to is not None:
        check_target(report_to)
    console = Console(width=None if sys.stdout.isatty() else 120)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        found = run(device, backends=None if backend is None else [backend], golden_folder=golden, timed=True,
                    on_case=lambda name, done, total: bar.update(task, description=name, completed=done, total=total))
    peaks = {where: peak(where) for where in dict.fromkeys(t.device for t in found.times)}

    console.print(_each(found) if verbose else _grouped(found, golden))
    if found.times:
        console.print(_timed(found.times, peaks))
    for result in found.failures[:20]:
        console.print(f"{'DIFFERS' if result.ended else 'FAILED '}  {result}", markup=False, soft_wrap=True)
    for missing in found.not_run:
        console.print(f"not run  {missing}", markup=False, soft_wrap=True)
    if found.failures:
        console.print(found.summary, markup=False)
    elif not found.results:
        console.print("nothing was run", markup=False)
    else:
        console.print(f"all {len(found.results)} results that were computed are the stored ones, bit by bit", markup=False)
    if report_to is not None:
        with written(report_to) as temporary:
            temporary.write_text(json.dumps(_facts(found, peaks), indent=1) + "\n")
        console.print(f"{report_to}: attach this file to a report", markup=False, soft_wrap=True)
    return found.agree


def _together(results) -> str:
    return hashlib.sha256("".join(r.digest for r in results).encode()).hexdigest()[:8]


def _verdict(results) -> str:
    wrong = sum(not r.ok for r in results)
    if not all(r.ended for r in results):
        return "NO: stopped"
    return "yes" if not wrong else f"NO: {wrong} differ" if wrong > 1 else "NO"


def _grouped(found: Report, golden) -> Table:
    """A row for each backend: of each group of cases the digest of all digests, and how many of how many were run."""
    groups = list(dict.fromkeys(_GROUPS.values()))
    total = Counter(_GROUPS[case.op] for case in golden_digests(None if golden is None else Path(golden)).cases)
    table = Table("device", "backend", *groups, "seconds", "ok", title="golden digests",
                  caption="SHA-256 over the results of a group, and how many of its cases were run")
    for device, backend in dict.fromkeys((r.device, r.backend) for r in found.results):
        results = [r for r in found.results if (r.device, r.backend) == (device, backend)]
        cells = []
        for group in groups:
            some = [r for r in results if _GROUPS.get(r.op) == group]
            cells.append(f"{_together(some)} {len(some)}/{total[group]}" if some else "not run")
        table.add_row(device, backend, *cells, f"{sum(r.seconds for r in results):.1f}", _verdict(results))
    return table


def _each(found: Report) -> Table:
    table = Table("device", "backend", "case", "digest", "seconds", "ok", title="golden digests")
    for r in found.results:
        table.add_row(r.device, r.backend, r.case, r.digest[:16], f"{r.seconds:.3f}", _verdict([r]))
    return table


def _timed(times: Sequence[Timing], peaks: dict[str, Peak]) -> Table:
    said = ", ".join(f"{device}: {p.bandwidth / 1e9:.0f} GB/s, from {p.source}" for device, p in peaks.items())
    table = Table("device", "backend", "kernel", "microseconds", "GB/s", "of the roofline", title="times on the GPU",
                  caption=said)
    for t in times:
        table.add_row(t.device, t.backend, t.case, f"{t.seconds * 1e6:.1f}", f"{t.bandwidth / 1e9:.0f}",
                      f"{t.bandwidth / peaks[t.device].bandwidth:.0%}")
    return table


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _facts(found: Report, peaks: dict[str, Peak]) -> dict:
    """Everything that somebody needs who was not there: versions, devices, backends with reasons, digests, times."""
    from . import __version__

    devices = {f"cuda:{i}": device_facts(i) for i in range(torch.cuda.device_count())}
    return {
        "format": FORMAT,
        "agree": found.agree,
        "versions": {"fastdiff": __version__, "python": platform.python_version(), "torch": torch.__version__,
                     "cuda": torch.version.cuda, **{name: _version(name) for name in ("triton", "numpy")}},
        "machine": {"system": platform.system(), "release": platform.release(), "processor": platform.machine(),
                    "instruction set": ops.instruction_set(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "environment": {name: os.environ[name] for name in ("FASTDIFF_BACKEND", "FASTDIFF_ISA", "TRITON_INTERPRET")
                        if name in os.environ},
        "devices": devices,
        "backends": [asdict(choice) for choice in ops.backends()],
        "results": [{**asdict(r), "ok": r.ok} for r in found.results],
        "not_run": [asdict(missing) for missing in found.not_run],
        "times": [{**asdict(t), "bandwidth": t.bandwidth, "roofline": t.bandwidth / peaks[t.device].bandwidth}
                  for t in found.times],
        "peaks": {device: asdict(p) for device, p in peaks.items()},
    }
