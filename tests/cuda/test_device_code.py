"""What nvcc makes of the kernels: no memory of a thread's own, no barrier, vector access, no spill. Compiled only; nothing here
runs on a GPU. tests/proof looks at the arithmetic."""

import re

import pytest

from cuda_build import NVCC_FLAGS, ROOT, compiled, resources

UNITS = ("step", "noise")
# Most registers a kernel may take, by (elements a thread, features, outputs). A multiprocessor has 65,536.
REGISTERS = {"Li8E Features3 Li1E": 64, "Li8E Features3 Li2E": 80, "Li8E Features3 Li3E": 80, "Li16E Features3 Li1E": 128,
             "Li16E Features3 Li2E": 128, "Li16E Features3 Li3E": 168, "Li4E Features0 Li3E": 72, "Li8E Features0 Li3E": 128,
             "Li4E Features1 Li3E": 80, "Li8E Features1 Li3E": 128, "Li4E Features2 Li3E": 128}
OTHERS = {"normal_kernelILi4E": 32, "normal_kernelILi8ELNS_8FeaturesE0": 40, "normal_kernelILi8ELNS_8FeaturesE3": 40, "normal_kernelILi16E": 48,
          "fold_in_kernel": 40, "run_keys_kernel": 40, "raw_words_kernel": 32}


def budget(name):
    """The entry of a mangled kernel name."""
    step = re.search(r"step_kernelI(Li\d+E)LNS_8FeaturesE(\d)E(Li\dE)E", name)
    return REGISTERS[f"{step[1]} Features{step[2]} {step[3]}"] if step else next(v for k, v in OTHERS.items() if k in name)


def code(unit):
    """{kernel: instructions} of a unit's PTX."""
    text = re.sub(r"//[^\n]*", "", (compiled() / f"{unit}.ptx").read_text())
    parts = re.split(r"\.entry\s+(\w+)", text)
    return {name: body for name, body in zip(parts[1::2], parts[2::2])}


@pytest.fixture(params=UNITS)
def kernels(request):
    return code(request.param)


def test_flags_are_those_of_the_build():
    build = (ROOT / "setup.py").read_text()
    nvcc = re.search(r"^NVCC = \[(.*?)\]", build, re.M | re.S)[1]
    assert all(flag in nvcc for flag in NVCC_FLAGS)
    assert "fast" not in nvcc and "ftz=true" not in nvcc and "prec-" not in nvcc


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
    assert len(report) == {"step": len(REGISTERS), "noise": len(OTHERS)}[unit]
    for name, (registers, stack, stores, loads) in report.items():
        assert (stack, stores, loads) == (0, 0, 0), name
        most = budget(name)
        assert registers <= most, f"{name}: {registers} registers, budget {most}"
    assert "warning" not in (compiled() / f"{unit}.txt").read_text()
