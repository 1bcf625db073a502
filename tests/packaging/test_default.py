"""The default GPU backend is the one that `fastdiff doctor` says it is, for the reason that it gives."""

import json
import re
from pathlib import Path

import pytest

from fastdiff import ops

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "launch_cost.json"


def test_the_default_costs_what_is_said_of_it():
    """The measurement is stored (python -m benchmarks.launch_cost); the sentence is in fastdiff/ops.py."""
    stored = json.loads(RESULT.read_text())
    first, second = ops.BACKENDS["cuda"][:2]
    assert re.search(rf"less than an eighth of {second}'s \(benchmarks/results/{RESULT.name}\)", ops.DEFAULT["cuda"])
    assert len(stored["calls"]) >= 3
    for call in stored["calls"]:
        assert call["us"][second] > 8 * call["us"][first] > 0, call


def test_a_device_without_a_backend_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="device is mps: cpu, cuda is taken"):
        ops.chosen("mps")
    if not any(c.usable for c in ops.backends() if c.device == "cuda"):
        with pytest.raises(ValueError, match="device is cuda: this torch has no CUDA"):
            ops.chosen("cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_backend_is_used_and_it_can_be(device):
    several = [c for c in ops.backends() if c.device == device]
    assert {c.backend for c in several} == set(ops.BACKENDS[device]) and all(c.reason for c in several)
    used = [c for c in several if c.used]
    assert len(used) == any(c.usable for c in several) and all(c.usable for c in used)
