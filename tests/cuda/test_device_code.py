"""What nvcc makes of the kernels: no memory of a thread's own, no barrier, vector access, no spill. Compiled only; nothing here
runs on a GPU. tests/proof looks at the arithmetic."""

import re

import pytest

from cuda_build import ARCHS, NVCC_FLAGS, ROOT, UNITS, compiled, resources
from proof.bits import label
from proof.budgets import kept, same_compilers
from proof.cuda_launches import kernels as kernels_of


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
    for name, body in code("edit").items():
        if "squares_kernelILi1E" not in name:
            assert re.search(r"ld\.global(\.\w+)*\.v4\.[bfu]32|ld\.global(\.\w+)*\.v2\.[bu]64", body), name
        if "edit_kernel" in name:
            assert re.search(r"st\.global(\.\w+)*\.v4\.[bfu]32", body), name
    for name, body in code("noise").items():
        if "normal_kernel" in name:
            assert re.search(r"st\.global(\.\w+)*\.v4\.[bfu]32", body), name


def test_the_parameter_is_read_where_it_lies(kernels):
    """Indexing the views of the parameter must not copy it: no address of it is ever taken into generic space."""
    for name, body in kernels.items():
        assert "cvta.param" not in body and "cvta.to.local" not in body, name


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_spills(arch):
    """By ptxas itself; the registers are those of tests/budgets.json."""
    found = {}
    for unit in UNITS:
        report = (compiled(arch) / f"{unit}.txt").read_text()
        assert "warning" not in report
        found |= resources(report)
    assert all(used[1:] == (0, 0, 0) for used in found.values()), found
    same_compilers()
    most = kept()["compiled"][f"sm_{arch}"]
    names = {name: label(kernel) for name, kernel in kernels_of(arch).items()}
    assert {names[name] for name in found} == set(most)
    over = {names[name]: f"{used[0]} registers, {most[names[name]]['registers']} budgeted" for name, used in found.items()
            if used[0] > most[names[name]]["registers"]}
    assert over == {}
