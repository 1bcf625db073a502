"""Golden digests: does every backend of this machine return the bits that fastdiff promises?

    fastdiff selftest                       on the command line
    assert_backends_agree(device="cuda")    in a test
    fastdiff_golden("cuda")                 the same as a fixture of pytest, which skips where there is no such device

A fixed list of cases, of every op and every sampler, has the SHA-256 of its results stored with the package; they were computed
by ``fastdiff.reference``. Cases are made without random generators or mathematics libraries, so the digests hold for
every version of Python, NumPy and torch, and on every device. ``docs/gpu-ci.md`` says what to do where one differs.
"""

from collections.abc import Sequence

import torch

from .backends import Backend, NotRun, Report, Result, available, run

__all__ = ["Backend", "NotRun", "Report", "Result", "assert_backends_agree", "available", "run"]


def assert_backends_agree(
    device: str | torch.device = "cpu",
    *,
    backends: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    time_limit: float = 600.0,
) -> Report:
    """Every usable backend of a device returns the bits of the golden digests.

    device: "cpu", "cuda" or "cuda:1"; backends: names out of "cpp", "triton-interpreted", "reference" (CPU), "cuda", "triton"
    (CUDA), None for all; cases: beginnings of case names, such as "step_/" or "sampler/ddim", None for all;
    time_limit: seconds for a backend that runs in a process of its own, which interpreted Triton does.

    Returns the ``Report``: what ran, and what did not, with its reason. Raises ``AssertionError`` naming backend, case and the
    first element that differs from the reference, or what became of a backend's process that did not end well;
    ``RuntimeError`` where nothing could be run, since a test of nothing must not pass; ``ValueError`` or ``TypeError`` for an
    argument that is not taken, and for a beginning that no case has.

    >>> report = assert_backends_agree("cpu", backends=["reference"], cases=["fold_in/"])
    >>> len(report.results)
    3
    """
    report = run(device, backends=backends, cases=cases, time_limit=time_limit)
    if not report.results:
        raise RuntimeError(f"nothing was run on {device}: " + "; ".join(map(str, report.not_run)))
    if report.failures:
        shown = "\n".join(map(str, report.failures[:10]))
        more = f"\nand {len(report.failures) - 10} more" * (len(report.failures) > 10)
        raise AssertionError(f"{report.summary}:\n{shown}{more}")
    return report
