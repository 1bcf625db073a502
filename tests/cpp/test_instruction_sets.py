"""Which code runs where: the machine code of each namespace, and the baseline on a machine that has nothing else."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest

SCRIPT = """
import random, sys
import torch, fastdiff
from cases import assert_same, expected_case, random_case
ops = torch.ops.fastdiff
print(ops.isa(), "of", ops.usable_isas())
for seed in range(40):
    case = random_case(random.Random(seed))
    expected = expected_case(case)
    ops.step_(*case.args())
    assert_same(case, expected)
print("same bits")
"""


def python(script, **environment):
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path, **environment},
                          capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def functions(ops):
    """Opcodes and operands of every function in the library: {mangled name: [(opcode, operands)]}."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    if "avx2" not in ops.usable_isas():
        pytest.skip(f"this machine runs {ops.usable_isas()}: there is no x86 code to look at")
    library = importlib.import_module("fastdiff._C").__file__
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True).stdout
    found, name = defaultdict(list), None
    for line in text.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            name = match[1]
        elif match := re.match(r"\s+[0-9a-f]+:\s+(\S+)\s*(.*)", line):
            found[name].append((match[1], match[2]))
    return found


def code(functions, namespace):
    """All instructions of fastdiff::<namespace>."""
    tag = f"8fastdiff{len(namespace)}{namespace}"
    return [i for name, body in functions.items() if tag in name for i in body]


def test_avx512(functions):
    opcodes = {opcode for opcode, operands in code(functions, "avx512") if "zmm" in operands}
    assert {"vpmuludq", "vpternlogq", "vcvtudq2ps"} <= opcodes
    assert any(opcode.startswith("vfmadd") for opcode in opcodes)


def test_avx2(functions):
    instructions = code(functions, "avx2")
    opcodes = {opcode for opcode, operands in instructions if "ymm" in operands}
    assert {"vpmuludq", "vpsrld", "vcvtph2ps"} <= opcodes
    assert any(opcode.startswith("vfmadd") for opcode in opcodes)
    assert not any("zmm" in operands or "%k" in operands for _, operands in instructions)


def test_everything_else_runs_anywhere(functions):
    """Neither the baseline nor what the linker may have merged from the other files uses more than SSE2."""
    assert {"mulps", "mulss", "mulsd", "mulpd"} & {opcode for opcode, _ in code(functions, "baseline")}
    for name, body in functions.items():
        if "8fastdiff4avx2" in name or "8fastdiff6avx512" in name:
            continue
        for opcode, operands in body:
            assert not opcode.startswith("v") or opcode.startswith("verr"), (name, opcode, operands)
            assert "ymm" not in operands and "zmm" not in operands, (name, opcode, operands)


def test_no_approximate_instruction(functions):
    """No reciprocal estimates and no call into libm: both differ from machine to machine."""
    for namespace in ("baseline", "avx2", "avx512"):
        for opcode, operands in code(functions, namespace):
            assert not opcode.lstrip("v").startswith(("rcp", "rsqrt")), (namespace, opcode)
            assert not (opcode.startswith("call") and re.search(r"<(fma|sqrt|log|sin|cos|exp)", operands)), (namespace, operands)


def test_baseline_on_a_plain_machine(ops):
    """glibc told that the machine has no AVX2, FMA or AVX-512, as its own dispatch then finds it."""
    done = python(SCRIPT, FASTDIFF_ISA="baseline", GLIBC_TUNABLES="glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F,-AVX512VL")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("baseline of") and "same bits" in done.stdout


def test_unknown_instruction_set(ops):
    with pytest.raises(ValueError, match="'sse9'.*baseline"):
        ops.set_isa("sse9")
    done = python("import torch, fastdiff\ntorch.ops.fastdiff.isa()", FASTDIFF_ISA="sse9")
    assert done.returncode != 0 and "sse9" in done.stderr
