"""What nvcc makes of the kernels: no approximate or flushing arithmetic, no contraction, no memory of a thread's own, no
barrier, vector access, no spill. Compiled only; nothing here runs on a GPU."""

import re

import pytest

from cuda_build import NVCC_FLAGS, ROOT, compiled, resources

UNITS = ("step", "noise")
# Most registers a kernel may take: 128 threads a block, 65,536 registers a multiprocessor.
# So many leave room for 7, 6, 4, 5 and 4 blocks.
REGISTERS = {("step_kernelILi4E", "FeaturesE0"): 72, ("step_kernelILi4E", "FeaturesE1"): 80, ("step_kernelILi4E", "FeaturesE2"): 128,
             ("step_kernelILi8E", "FeaturesE0"): 96, ("step_kernelILi8E", "FeaturesE1"): 128, ("normal_kernelILi4",): 40,
             ("normal_kernelILi8",): 56, ("fold_in",): 40, ("run_keys",): 40, ("raw_words",): 32}


def code(unit):
    """{kernel: instructions} of a unit's PTX."""
    text = re.sub(r"//[^\n]*", "", (compiled() / f"{unit}.ptx").read_text())
    parts = re.split(r"\.entry\s+(\w+)", text)
    return {name: body for name, body in zip(parts[1::2], parts[2::2])}


@pytest.fixture(params=UNITS)
def kernels(request):
    return code(request.param)


def instructions(body):
    return re.findall(r"^\s*(?:\{?\s*@!?%\w+\s+)?([a-z]\w*(?:\.\w+)+)\s+[^;]*;", body, re.M)


def test_flags_are_those_of_the_build():
    build = (ROOT / "setup.py").read_text()
    nvcc = re.search(r"^NVCC = \[(.*?)\]", build, re.M | re.S)[1]
    assert all(flag in nvcc for flag in NVCC_FLAGS)
    assert "fast" not in nvcc and "ftz=true" not in nvcc and "prec-" not in nvcc


def test_arithmetic_is_ieee(kernels):
    for name, body in kernels.items():
        found = instructions(body)
        assert found, name
        for one in found:
            assert not re.search(r"\.(approx|ftz|full|sat|f64)\b", one), (name, one)
            if re.match(r"(add|sub|mul|fma|mad|div|rcp|sqrt)\b.*\.f32$", one):
                assert ".rn." in one, (name, one)
            # min and max would drop a NaN; clip must compare and select.
            assert not re.match(r"(min|max|ex2|lg2|sin|cos|rsqrt|tanh|copysign)\b.*\.f(16|32)", one), (name, one)
            if re.match(r"cvt\b.*\.(f16|f16x2|bf16x2|f32)\.(f32|u32|s32)$", one):
                assert one.startswith("cvt.rn."), (name, one)


def test_a_thread_keeps_to_itself(kernels):
    for name, body in kernels.items():
        assert not re.search(r"\.local\b|\.shared\b|\bbar\.|\bbarrier\b|\bcall\b|\bmembar\b|\bfence\b", body), name


def test_access_is_16_bytes_wide():
    for name, body in code("step").items():
        if "ILi4E" in name and "FeaturesE2" in name:  # any dtype, four elements a thread: 8 bytes for the 16-bit ones
            assert re.search(r"ld\.global(\.\w+)*\.v2\.[bu]32", body), name
        assert re.search(r"ld\.global(\.\w+)*\.v4\.[bfu]32|ld\.global(\.\w+)*\.v2\.[bu]64", body), name
        assert re.search(r"st\.global(\.\w+)*\.v4\.[bfu]32|st\.global(\.\w+)*\.v2\.[bu]64", body), name
    for name, body in code("noise").items():
        if "normal_kernel" in name:
            assert re.search(r"st\.global(\.\w+)*\.v4\.[bfu]32", body), name


def test_the_parameter_is_read_where_it_lies(kernels):
    """Indexing the views of the parameter must not copy it: no address of it is ever taken into generic space."""
    for name, body in kernels.items():
        assert "cvta.param" not in body and "cvta.to.local" not in body, name


@pytest.mark.parametrize("unit", UNITS)
def test_registers_and_spills(unit):
    report = resources((compiled() / f"{unit}.txt").read_text())
    assert len(report) == {"step": 5, "noise": 5}[unit]
    for name, (registers, stack, stores, loads) in report.items():
        assert (stack, stores, loads) == (0, 0, 0), name
        most = next(v for parts, v in REGISTERS.items() if all(part in name for part in parts))
        assert registers <= most, f"{name}: {registers} registers, budget {most}"
    assert "warning" not in (compiled() / f"{unit}.txt").read_text()
