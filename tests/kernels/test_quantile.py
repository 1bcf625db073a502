"""The Triton kernels of quantile_: interpreted they return the bits of the exact reference; compiled they ask for every rounding by
name, read whole vectors and keep nothing in local memory."""

import importlib.util
import json

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


@pytest.mark.parametrize("check", ["0 25", "corners"])
def test_bits(worker, check):
    worker("interpreted_quantile.py", *check.split(), TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def on_sm_90(worker):
    return json.loads(worker("compiled_quantile.py", "90").splitlines()[-1])


def test_what_is_compiled(on_sm_90):
    assert len(on_sm_90) == 4 * 5 + 1
    for name, found in on_sm_90.items():
        label = f"{name}: {found}"
        assert found["faults"] == [] and found["usage"]["LOCAL"] == found["spills"] == 0, label
        assert not any(part in op for op in found["memory"] for part in (".local", "acq", "rel.", ".f32")), label
        # A histogram of 256 counts goes through shared memory; counts are added as integers, so that no order of them matters.
        assert found["shared"] == (0 if name == "quantile" else 1024), label
        assert {op for op in found["memory"] if op.startswith(("atom", "red"))} == (
            set() if name == "quantile" else {"atom.shared.add.u32", "atom.global.gpu.relaxed.add.u64"}), label


@pytest.mark.parametrize("name, count", [("pass 0 fp32", 4), ("pass 3 fp32", 4), ("pass 0 fp16", 2), ("pass 0 bf16", 2)])
def test_wide_accesses(on_sm_90, name, count):
    """256 elements of each of two inputs by 32 threads, 16 bytes at a time."""
    assert on_sm_90[name]["memory"]["ld.global.v4.b32"] == count, on_sm_90[name]


@pytest.mark.parametrize("arch", ["80", "100", "gfx942"])
def test_other_gpus(worker, arch):
    assert len(json.loads(worker("compiled_quantile.py", arch, "short").splitlines()[-1])) == 5
