"""What the compiler makes of the kernels, for GPUs that need not be there: every rounding asked for by name, 16 bytes an access,
and nothing of shared memory, local memory, barriers or approximations."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

HERE = Path(__file__).parent


def worker(*arguments):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(HERE / "compiled.py"), *map(str, arguments)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


WIDE = {  # loads and stores of tensors: instruction, and how often at least
    "ddim fp32": {"ld.global.v4.b32": 4, "st.global.v4.b32": 2},
    "ddim fp16": {"ld.global.v4.b32": 2, "st.global.v4.b32": 1},
    "ddpm fp32": {"ld.global.v4.b32": 4, "st.global.v4.b32": 2},
    "ddpm fp16": {"ld.global.v4.b32": 2, "st.global.v4.b32": 1},
    "ddpm bf16": {"ld.global.v4.b32": 2, "st.global.v4.b32": 1},
    "mixed": {"ld.global.v4.b32": 2, "ld.global.v2.b32": 4, "st.global.v4.b32": 2, "st.global.v2.b32": 2},
    "steered": {"ld.global.v2.b32": 4, "ld.global.v4.b32": 4, "st.global.v2.b32": 2},
    "everything fp32": {"ld.global.v4.b32": 18, "st.global.v4.b32": 8},
    "everything fp16": {"ld.global.v4.b32": 9, "st.global.v4.b32": 4},
    "normal fp32": {"st.global.v4.b32": 2},
    "normal fp16": {"st.global.v4.b32": 1},
}


def check(label, found, stack=0):
    label = f"{label}: {found}"
    assert found["faults"] == [], label
    usage = found["usage"]
    assert found["shared"] == usage["SHARED"] == usage["LOCAL"] == 0 and usage["STACK"] <= stack, label
    assert found["spills"] <= stack // 4, label
    assert found["barriers"] == found["shuffles"] == 0, label
    assert not any(part in op for op in found["memory"] for part in (".shared", ".local", "acq", "rel.")), label


@pytest.mark.parametrize("arch, names", [
    (90, []),
    (80, ["ddpm fp32", "ddpm bf16", "everything fp16"]),
    (100, ["ddpm fp32", "ddpm bf16", "everything fp16"]),
])  # fmt: skip
def test_what_is_compiled(arch, names):
    for name, found in worker(arch, *names).items():
        check(f"{name}, sm_{arch}", found)
        for op, count in WIDE.get(name, {}).items():
            assert found["memory"].get(op, 0) >= count, f"{op}: {name}, sm_{arch}: {found}"
        print(f"sm_{arch} {name}: {found['usage']['REG']} registers, {found['instructions']} instructions in all for "
              f"{found['elements a thread']} elements a thread, {found['wide multiplications']} of them IMAD.WIDE")


def test_drawn_cases_compile_as_well():
    for label, found in worker("drawn", 0, 6).items():
        # ptxas calls a subroutine for square roots outside the usual range, and may keep predicates on the stack meanwhile.
        check(label, found, stack=16)


def test_nothing_is_recompiled_from_step_to_step():
    for what, kinds in worker("specializations").items():
        assert len(kinds) == 1, (what, kinds)
