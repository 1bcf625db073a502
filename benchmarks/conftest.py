"""Threads, and the table of ratios at the end of a run (``make bench``)."""

import importlib.metadata
import json

import pytest
import torch

import fastdiff as fd
from fastdiff.files import written

RATIOS = []


def pytest_addoption(parser):
    parser.addoption("--ratios", help="JSON file to write the table of ratios to")


@pytest.fixture(autouse=True, scope="session")
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture
def ratio(benchmark, request):
    """Records one comparison: how many times ours is faster than theirs, beside the target, which is never asserted."""

    def record(what, shape, ours, theirs, target, times):
        value = theirs / ours
        row = {"what": what, "shape": list(shape), "ours_us": ours * 1e6, "theirs_us": theirs * 1e6, "ratio": value,
               "target": target, "reached": value >= target, "quartiles_us": {k: [t * 1e6 for t in v] for k, v in times.items()}}
        benchmark.extra_info.setdefault("ratios", []).append(row)
        RATIOS.append(row)

    return record


def pytest_terminal_summary(terminalreporter, config):
    if not RATIOS:
        return
    if config.getoption("--ratios"):
        with written(config.getoption("--ratios")) as temporary:
            about = {"torch": torch.__version__, "diffusers": importlib.metadata.version("diffusers"), "threads": 2,
                     "instruction_set": fd.ops.instruction_set(), "command": "make bench"}
            temporary.write_text(json.dumps({**about, "ratios": RATIOS}, indent=1) + "\n")
    terminalreporter.section("ratios: theirs / ours, medians of interleaved calls, two threads")
    terminalreporter.write_line(f"{'what':58} {'shape':>18} {'ours us':>10} {'theirs us':>10} {'ratio':>8} {'target':>7}")
    for r in RATIOS:
        mark = "" if r["reached"] else "  missed"
        terminalreporter.write_line(f"{r['what']:58} {str(tuple(r['shape'])):>18} {r['ours_us']:10.1f} {r['theirs_us']:10.1f} "
                                    f"{r['ratio']:8.2f} {r['target']:7.2f}{mark}")
