"""fastdiff._C_cuda beside a CUDA torch, without a driver: every op with its schema, the machine code of every target, and calls
that get as far as the missing driver. `make cuda-build` builds it and runs this."""

import json
import os
import re
import subprocess
import sys
from importlib import resources, util
from pathlib import Path

import pytest
import torch

LEFT_TO_TRITON = ("project_", "lift_", "quantile_")  # registered from Python, in fastdiff/ops.py
TARGETS, PTX = {"80", "90", "100"}, {"100"}  # what setup.py asks for where TORCH_CUDA_ARCH_LIST is not set
# What the library may take from outside beside C and C++: libtorch's stable ABI, Python's limited API, the CUDA runtime.
STABLE = re.compile(r"(aoti_)?torch_|Py|(__)?cuda")  # C names: libtorch's C++ ones begin with _ZN
LANGUAGE = re.compile(r"GLIBC|CXXABI|GCC_|_ZNK?St|_ZS|_ZT[IVS]|_Zd|_Zn|_ITM|__gmon_start__")

BEGIN = """
import json
import torch, fastdiff, fastdiff._C_cuda
"""


@pytest.fixture(scope="module")
def library():
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA: fastdiff._C_cuda is not built for it (make cuda-build has one that is)")
    found = util.find_spec("fastdiff._C_cuda")
    if found is None:
        pytest.skip("fastdiff._C_cuda was not built (no nvcc, or FASTDIFF_SKIP_CUDA)")
    return found.origin


def python(code, folder, **environment):
    """Runs code in a process and a folder of its own, where the checkout does not stand before what is installed."""
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("FASTDIFF_")}, **environment}
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def schemas():
    """(line of ops.schema, name): the ops that work on tensors, which every backend implements."""
    lines = resources.files("fastdiff").joinpath("ops.schema").read_text().split("\n")
    return [(line, line.split("(")[0]) for line in lines if "Tensor" in line]


def test_every_op_has_its_schema_and_its_implementation(library, tmp_path):
    code = f"""
left = {LEFT_TO_TRITON}
for line, name in {schemas()}:
    full = "fastdiff::" + name
    assert torch._C._get_schema(full, "") == torch._C.parse_schema("fastdiff::" + line), name
    assert torch._C._dispatch_has_kernel_for_dispatch_key(full, "CUDA"), name
    where = torch._C._dispatch_dump(full).split("CUDA: ")[1].split("\\n")[0]
    assert ("fastdiff/ops.py" if name in left else "csrc/cuda/library.cpp") in where, (name, where)
    print(name)
"""
    ours = {"step_", "normal_", "edit_", "fold_in", "run_keys", "raw_words"}
    assert set(python(code, tmp_path).split()) == {*ours, *LEFT_TO_TRITON}


CALLS = """
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # names the implementation: tensors on the CPU will do for its checks
ops = torch.ops.fastdiff

def step(shape=(2, 3), columns=None):
    x = torch.zeros(shape)
    columns = columns or fastdiff.reference.Layout(2, 1, 0, 0).width
    meta = torch.tensor([[-1, 0, -1, -1]], dtype=torch.int32)
    return ops.step_, ([x, x.clone()], [x], None, torch.zeros(1, columns), meta, None, 0, *[None] * 9)

def edit(terms=1, out=None, shape=(2, 3)):
    h = torch.ones(shape)
    return ops.edit_, (h if out is None else out, h, torch.ones(2, *shape[1:]), torch.zeros(shape[0], terms, dtype=torch.int64),
                       torch.ones(shape[0], 1))

keys, two = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
right = [step(), edit(), (ops.normal_, (torch.zeros(2, 3), keys)), (ops.fold_in, (keys, torch.arange(2))),
         (ops.run_keys, (torch.arange(2), two, two)), (ops.raw_words, (keys, 5))]
wrong = [step(columns=3), edit(terms=2), edit(out=torch.ones(2, 4)), (ops.normal_, (torch.zeros(3, 3), keys)), (ops.normal_, (torch.zeros(2, 3, dtype=torch.float64), keys)),
         (ops.fold_in, (keys.int(), torch.arange(2))), (ops.run_keys, (torch.arange(2), two, two.T)), (ops.raw_words, (keys, -1))]
empty = [step((0, 3)), step((2, 0)), edit(shape=(0, 3)), edit(shape=(2, 0))]

def said(call, *args):
    try:
        return str(type(call(*args)))
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"

for kind, calls in (("right", right), ("wrong", wrong), ("empty", empty)):
    for op, args in calls:
        print(json.dumps((kind, op.default.name(), said(op.default.redispatch, CUDA, *args), said(op.default, *args))))
"""


def test_calls_reach_the_driver_and_mistakes_are_refused_before(library, tmp_path):
    """The implementations read the dispatcher's stack by hand: here libtorch itself calls them, with every kind of argument."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: test_gpu.py calls the ops on it")
    lines = [json.loads(line) for line in python(CALLS, tmp_path).splitlines()]
    assert [kind for kind, *_ in lines] == ["right"] * 6 + ["wrong"] * 8 + ["empty"] * 4
    for kind, op, cuda, cpu in lines:
        if kind == "right":
            assert "libtorch failed in aoti_torch_get_current_cuda_stream" in cuda and "Error" not in cpu, (op, cuda, cpu)
        elif kind == "wrong":
            assert cuda == cpu and "Error" in cuda and op.split("::")[1] in cuda, (op, cuda, cpu)
        else:
            assert cuda == cpu == "<class 'NoneType'>", (op, cuda, cpu)


@pytest.mark.parametrize("asked, used, why", [
    ({}, "cuda", "the default"),
    ({"FASTDIFF_BACKEND": "triton"}, "triton", "FASTDIFF_BACKEND=triton"),
])  # fmt: skip
def test_doctor_says_which_backend_is_used_and_why(library, tmp_path, asked, used, why):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTDIFF_", "TRITON_"))}
    command = [sys.executable, "-m", "fastdiff", "doctor"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env | asked)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if re.search("cuda +│ .* │ yes +│ yes", line)]
    assert len(lines) == 1 and f"│ {used} " in lines[0] and why in lines[0], ran.stdout
    if not torch.cuda.is_available():
        assert re.search("GPUs +│ +none", ran.stdout), ran.stdout


def cuobjdump():
    """The one of CUDA, or the one that comes with Triton."""
    triton = util.find_spec("triton")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", triton and Path(triton.origin).parent / "backends" / "nvidia"]
    found = [Path(home) / "bin" / "cuobjdump" for home in homes if home and (Path(home) / "bin" / "cuobjdump").exists()]
    return found[0] if found else pytest.skip("no cuobjdump")


def test_the_machine_code_of_every_target_is_inside(library):
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        pytest.skip(f"TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']}: built for chosen targets")

    def listed(option):
        text = subprocess.run([cuobjdump(), option, library], capture_output=True, text=True, check=True).stdout
        return sorted(re.findall(r"\.sm_(\w+)\.(?:cubin|ptx)", text))

    units = 3  # step.cu, noise.cu, edit.cu
    assert listed("--list-elf") == sorted([*TARGETS] * units)
    assert listed("--list-ptx") == sorted([*PTX] * units)


def test_it_needs_nothing_of_torch_but_the_stable_abi(library):
    """One binary for every torch from 2.11 on: no C++ symbol of libtorch, no symbol of Python beyond the limited API."""
    text = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in text.splitlines()]
    assert len(names) > 30 and "aoti_torch_get_current_cuda_stream" in names
    assert [n for n in names if not STABLE.match(n) and not LANGUAGE.search(n)] == []
