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
    done = subprocess.run([sys.executable, str(HERE / "compiled.py"), *map(str, arguments)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ROUNDED = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "fma.rn.f32", "sqrt.rn.f32"}
CONVERSIONS = {"cvt.rn.f32.u32", "cvt.rn.f32.s32", "cvt.rn.f16.f32", "cvt.rn.bf16.f32", "cvt.f32.f16", "cvt.f32.bf16"}
WIDE = {  # loads and stores of tensors: instruction, and how often at least
    "ddim fp32": {"ld.global.v4.b32": 4, "st.global.v4.b32": 2},
    "ddim fp16": {"ld.global.v4.b32": 2, "st.global.v4.b32": 1},
    "ddpm fp32": {"ld.global.v4.b32": 4, "st.global.v4.b32": 2},
    "ddpm fp16": {"ld.global.v4.b32": 2, "st.global.v4.b32": 1},
    "ddpm bf16": {"ld.global.v4.b32": 2, "st.global.v4.b32": 1},
    "mixed": {"ld.global.v4.b32": 2, "ld.global.v2.b32": 4, "st.global.v4.b32": 2, "st.global.v2.b32": 2},
    "everything fp32": {"ld.global.v4.b32": 18, "st.global.v4.b32": 8},
    "everything fp16": {"ld.global.v4.b32": 9, "st.global.v4.b32": 4},
    "normal fp32": {"st.global.v4.b32": 2},
    "normal fp16": {"st.global.v4.b32": 1},
}


@pytest.mark.parametrize("arch, names", [
    (90, []),
    (80, ["ddpm fp32", "ddpm bf16", "everything fp16"]),
    (100, ["ddpm fp32", "ddpm bf16", "everything fp16"]),
])
def test_what_is_compiled(arch, names):
    for name, found in worker(arch, *names).items():
        label = f"{name}, sm_{arch}: {found}"
        assert set(found["arithmetic"]) <= ROUNDED, label
        assert {c for c in found["conversions"] if "f" in c} <= CONVERSIONS, label
        assert found["shared"] == found["usage"]["SHARED"] == found["usage"]["LOCAL"] == found["spills"] == found["usage"]["STACK"] == 0, label
        assert found["barriers"] == found["shuffles"] == 0, label
        assert not any(".shared" in op or ".local" in op for op in found["memory"]), label
        assert not any("acq_rel" in op for op in found["memory"]), label
        for op, count in WIDE.get(name, {}).items():
            assert found["memory"].get(op, 0) >= count, f"{op}: {label}"
        print(f"sm_{arch} {name}: {found['usage']['REG']} registers, {found['instructions']} instructions in all for "
              f"{found['elements a thread']} elements a thread, {found['wide multiplications']} of them IMAD.WIDE")


def test_nothing_is_recompiled_from_step_to_step():
    for what, kinds in worker("specializations").items():
        assert len(kinds) == 1, (what, kinds)
