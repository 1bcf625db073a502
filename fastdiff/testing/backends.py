"""The backends of this machine, and the golden cases run by each.

A backend that answers for a device in this process is called through ``torch.ops.fastdiff``, the reference and compiled
Triton directly. Any other runs in a process of its own, in which FASTDIFF_BACKEND names it: interpreted and compiled Triton do
not mix in one, and one library may stand in front of another.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .. import ops as choices
from .call import NAMES, TIME_LIMIT, check_call, kind_of
from .digests import Golden, difference, digest, golden, run_case
from .inputs import moved
from .timing import Timing, measure

__all__ = ["Backend", "NotRun", "Report", "Result", "available", "run"]


@dataclass(frozen=True)
class Result:
    """One case on one backend. message: "" where the digest is the stored one, else what is different.

    A backend whose process did not end well has one result, without an op: case is "all", message says what became of it.
    """

    device: str
    backend: str
    case: str
    op: str
    digest: str
    seconds: float
    message: str = ""

    @property
    def ok(self) -> bool:
        return not self.message

    @property
    def ended(self) -> bool:
        """Was the case run to its end, and not all of them cut off?"""
        return bool(self.op)

    def __str__(self) -> str:
        case = f", case {self.case!r}" if self.ended else ""
        return f"{self.backend} on {self.device}{case}: {self.message or 'agrees'}"


@dataclass(frozen=True)
class NotRun:
    """A backend, or some of its cases, and why they were not run."""

    device: str
    backend: str
    why: str
    cases: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = f"{len(self.cases)} case{'s' * (len(self.cases) > 1)}: " if self.cases else ""
        return f"{self.backend} on {self.device}: {what}{self.why}"


@dataclass
class Report:
    """What ran, what did not, and, where that was asked for, how long the kernels take on a GPU."""

    results: list[Result] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    times: list[Timing] = field(default_factory=list)

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if not result.ok]

    @property
    def agree(self) -> bool:
        """Did anything run, and did all that ran meet its digest?"""
        return bool(self.results) and not self.failures

    @property
    def summary(self) -> str:
        """How much failed, in a line; "" if nothing did."""
        cut_off = sum(not r.ended for r in self.results)
        wrong, several = len(self.failures) - cut_off, "s" * (cut_off > 1)
        said = [f"{wrong} of {len(self.results) - cut_off} results are not the stored ones"] if wrong else []
        return ", ".join(said + [f"{cut_off} backend{several} did not come to an end"] * bool(cut_off))

    def extend(self, other: "Report") -> None:
        self.results += other.results
        self.not_run += other.not_run
        self.times += other.times


@dataclass(frozen=True)
class Backend:
    """name: as in ``NAMES``; usable: whether it can be tried, reason: why (not)."""

    device: str
    name: str
    usable: bool
    reason: str

    @property
    def registered(self) -> str:
        """Its name in FASTDIFF_BACKEND."""
        return self.name.removesuffix("-interpreted")


def available(device: str | torch.device | None = None) -> list[Backend]:
    """The backends that golden cases can be run on, for a device or for all kinds, each with its reason.

    Raises ``ValueError`` for a device that is neither.
    """
    kinds = NAMES if device is None else (kind_of(device),)
    return [Backend(kind, name, *_usable(kind, name)) for kind in kinds for name in NAMES[kind]]


def _usable(kind: str, name: str) -> tuple[bool, str]:
    if kind == "cuda" and not torch.cuda.is_available():
        return False, "this torch has no CUDA" if torch.version.cuda is None else "no CUDA device was found"
    if name == "reference":
        return True, "NumPy"
    if name == "triton-interpreted":
        there = importlib.util.find_spec("triton") is not None
        return there, "in a process of its own" if there else "triton is not installed"
    choice = next(c for c in choices.backends() if (c.device, c.backend) == (kind, name))
    if not choice.usable and os.environ.get("FASTDIFF_BACKEND") not in (None, name):
        return True, "in a process of its own"  # it was not tried in this one
    return choice.usable, choice.reason


def _here(backend: Backend):
    """The backend's ops, where this process can call them; else None."""
    if backend.name == "reference":
        return importlib.import_module("fastdiff._reference_ops")
    if any(c.used for c in choices.backends() if (c.device, c.backend) == (backend.device, backend.registered)):
        if backend.registered == "triton":
            importlib.import_module("fastdiff.kernels")  # the op would do so when it is first called
        return torch.ops.fastdiff
    if backend.name == "triton" and torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return importlib.import_module("fastdiff.kernels")
    return None


def _loaded(backend: Backend) -> tuple[object | None, str]:
    """``_here``, and why not, where what it imports raises: a Triton that is half installed can raise anything."""
    try:
        return _here(backend), ""
    except Exception as error:
        return None, f"{backend.registered} does not load: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def run(
    device: str | torch.device | None = None,
    *,
    backends: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    golden_folder: str | os.PathLike | None = None,
    time_limit: float = TIME_LIMIT,
    timed: bool = False,
    on_case: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Runs golden cases on every usable backend and compares the SHA-256 of what they return with the stored digests.

    device: "cpu", "cuda", "cuda:1"; None: all kinds. backends: names out of "cpp", "triton-interpreted", "reference" (CPU),
    "cuda", "triton" (CUDA); None: all, but interpreted Triton only where Triton cannot run on a GPU of ``device``. cases: beginnings of case names, such as "step_/" or "sampler/ddim"; None: all.
    golden_folder: where the digests are, by default those of this package. time_limit: seconds for a backend that runs in
    a process of its own. timed: on a GPU, also measure the kernels of a backend that agrees. on_case(backend, done, total) is
    called as cases end.

    Raises ``ValueError`` or ``TypeError`` for an argument that is not taken, such as a backend of another device or a
    beginning that no case has, before anything runs.
    """
    stored, chosen = check_call(device, backends=backends, cases=cases, golden_folder=golden_folder, time_limit=time_limit)
    report, there = Report(), available(device)
    compiled = any(b.usable for b in there if b.name == "triton")
    for backend in there:
        if backends is not None and backend.name not in backends:
            continue
        if not backend.usable:
            report.not_run.append(NotRun(backend.device, backend.name, backend.reason))
            continue
        if backend.name == "triton-interpreted" and compiled and backends is None:
            report.not_run.append(NotRun(backend.device, backend.name, "slow, and Triton runs on the GPU here: ask for it by name"))
            continue
        slow = tuple(c.name for c in chosen if backend.name in c.slow)
        if slow:
            report.not_run.append(NotRun(backend.device, backend.name, "too slow there", slow))
        where = str(device) if device is not None else backend.device
        todo = [c for c in chosen if backend.name not in c.slow]
        implementation, broken = _loaded(backend)
        if broken:
            report.not_run.append(NotRun(where, backend.name, broken))
        elif implementation is None:
            report.extend(_elsewhere(backend, where, stored, todo, time_limit, timed, on_case))
        else:
            report.extend(_all(backend, where, implementation, stored, todo, timed, on_case))
    return report


def _instruction_sets(backend: Backend) -> Iterable[str]:
    """The C++ code of the CPU is several kernels: each in turn, where it can be switched."""
    if backend.name != "cpp":
        yield backend.name
        return
    before = torch.ops.fastdiff.isa()
    try:
        for name in torch.ops.fastdiff.usable_isas().split():
            torch.ops.fastdiff.set_isa(name)
            yield f"cpp, {name}"
    finally:
        torch.ops.fastdiff.set_isa(before)


def _all(backend: Backend, device, implementation, stored: Golden, cases, timed, on_case) -> Report:
    report = Report()
    for label in _instruction_sets(backend):
        for i, case in enumerate(cases):
            report.results.append(_one(label, device, implementation, stored.digests[case.name], case))
            if on_case is not None:
                on_case(label, i + 1, len(cases))
    if timed and backend.device == "cuda" and report.agree:
        try:
            report.times += measure(implementation, device, backend.name)
        except Exception as error:  # no memory left, for one: the digests are worth more than the times
            report.not_run.append(NotRun(backend.device, backend.name, f"times: {(str(error).splitlines() or [''])[0]}"))
    return report


def _one(label, device, implementation, expected, case) -> Result:
    start, found = time.perf_counter(), ""
    try:
        result = run_case(case, implementation, device)
        found = digest(result)
        message = "" if found == expected["digest"] else _why(case, result, expected)
    except Exception as error:  # a launch that fails is this case's failure, not the end of the report
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return Result(device, label, case.name, case.op, found, time.perf_counter() - start, message)


def _why(case, result, expected) -> str:
    given = digest(moved(case.build(), "cpu"))[:16]
    if given != expected["given"]:
        return f"its arguments were made otherwise on this machine ({given}, {expected['given']} is stored): nothing can be said"
    found = difference(case, result)
    return found or ("the digest is not the stored one, and the reference agrees with the backend: the stored digest is wrong "
                     "or old")


def _elsewhere(backend: Backend, device, stored: Golden, cases, time_limit, timed, on_case) -> Report:
    """``python -m fastdiff.testing --run`` in a process of its own."""
    interpreted = backend.name == "triton-interpreted"
    env = {k: v for k, v in os.environ.items() if k not in ("FASTDIFF_BACKEND", "TRITON_INTERPRET")}
    env |= {"FASTDIFF_BACKEND": backend.registered} | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    with tempfile.TemporaryDirectory(prefix="fastdiff-") as name:
        place = Path(name)
        task, answer = place / "task.json", place / "answer.json"
        task.write_text(json.dumps({"backend": backend.name, "device": device, "golden": str(stored.folder),
                                    "cases": [c.name for c in cases], "timed": timed}))
        command = [sys.executable, "-m", "fastdiff.testing", "--run", str(task), str(answer)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=time_limit)
        except subprocess.TimeoutExpired:
            why = f"did not end within {time_limit:g} seconds"
            return Report([Result(device, backend.name, "all", "", "", time_limit, why)])
        if done.returncode or not answer.is_file():
            last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
            why = f"its process ended with code {done.returncode}: {last}"
            return Report([Result(device, backend.name, "all", "", "", 0.0, why)])
        said = json.loads(answer.read_text())
    if said["not_run"]:
        return Report(not_run=[NotRun(device, backend.name, said["not_run"])])
    if on_case is not None:
        on_case(backend.name, len(cases), len(cases))
    results, times = [Result(**result) for result in said["results"]], [Timing(**timing) for timing in said["times"]]
    return Report(results, [NotRun(backend.device, backend.name, why) for why in said["untimed"]], times)


def answer_task(task: Path, answer: Path) -> None:
    """The other end of ``_elsewhere``."""
    asked = json.loads(task.read_text())
    stored, names = golden(Path(asked["golden"])), set(asked["cases"])
    kind = torch.device(asked["device"]).type
    backend = Backend(kind, asked["backend"], True, "")
    (implementation, reason), report = _loaded(backend), Report()
    if implementation is None:
        reason = reason or next(c.reason for c in choices.backends() if (c.device, c.backend) == (kind, backend.registered))
    else:
        cases = [c for c in stored.cases if c.name in names]
        report = _all(backend, asked["device"], implementation, stored, cases, asked["timed"], None)
    answer.write_text(json.dumps({"not_run": reason, "results": [asdict(result) for result in report.results],
                                  "times": [asdict(timing) for timing in report.times],
                                  "untimed": [missing.why for missing in report.not_run]}))
