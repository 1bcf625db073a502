"""The Triton kernels of project_, lift_ and edit_: interpreted they return the bits of the exact reference; compiled they ask for every
rounding by name, read whole vectors and keep nothing in local memory."""

import importlib.util
import json

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


@pytest.mark.parametrize("check", ["project_ 0 24", "lift_ 0 40", "edit_ 0 32", "corners"])
def test_bits(worker, check):
    worker("interpreted_vectors.py", *check.split(), TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def on_sm_90(worker):
    return json.loads(worker("compiled_vectors.py", "90").splitlines()[-1])


def test_what_is_compiled(on_sm_90):
    assert len(on_sm_90) == 18
    for name, found in on_sm_90.items():
        label = f"{name}: {found}"
        assert found["faults"] == [] and found["usage"]["LOCAL"] == found["spills"] == 0, label
        assert not any(part in op for op in found["memory"] for part in (".local", "acq", "rel.")), label
        if name.startswith("lift"):  # nothing changes threads
            assert found["shared"] == found["barriers"] == found["shuffles"] == 0, label
        wide = {op: count for op, count in found["memory"].items() if op.startswith("ld.global.v")}
        assert wide or ", " in name, label


@pytest.mark.parametrize("name, op, count", [
    ("project fp32", "ld.global.v4.b32", 10), ("project fp16", "ld.global.v4.b32", 8), ("squares fp32", "ld.global.v4.b32", 8),
    ("edit fp32", "ld.global.v4.b32", 24), ("edit fp32", "st.global.v4.b32", 8), ("lift fp32", "ld.global.v4.b32", 16),
    ("lift fp32, channels last", "st.global.v4.b32", 2),
])
def test_wide_accesses(on_sm_90, name, op, count):
    assert on_sm_90[name]["memory"].get(op, 0) >= count, on_sm_90[name]


@pytest.mark.parametrize("arch", ["80", "100", "gfx942"])
def test_other_gpus(worker, arch):
    assert len(json.loads(worker("compiled_vectors.py", arch, "short").splitlines()[-1])) == 7
