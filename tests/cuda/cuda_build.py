"""Compiles what tests look at: the emulator (any C++ compiler) and the GPU code (nvcc), for each target when asked for.

Results are kept in the system's folder for temporary files under a hash of the sources, so that only a change of
csrc/ or of the tests' C++ compiles anything.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
UNITS = tuple(sorted(path.stem for path in CUDA.glob("*.cu")))  # what nvcc compiles
ARCH, ARCHS = 90, (80, 90, 100)
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false"]  # as in setup.py, which test_device_code.py checks
STABLE_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
HOST_FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-fPIC", "-shared"]


def kept(name, build, *extra, sources=()):
    """The folder of a build, made by ``build(folder)`` unless it is there. Several processes may ask at once. No name may be
    another one's beginning. sources: files besides those of csrc/ and csrc/cuda/ that it is made from."""
    digest = hashlib.sha256(repr((name, *extra)).encode())
    for path in sorted([*(ROOT / "csrc").glob("*.h"), *CUDA.iterdir(), *sources]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    top = Path(tempfile.gettempdir()) / f"fastdiff-tests-{os.getuid()}"
    top.mkdir(exist_ok=True, mode=0o700)
    folder = top / f"{name}-{digest.hexdigest()[:20]}"
    with open(top / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for old in top.glob(f"{name}-*"):
                shutil.rmtree(old, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=top) as scratch:
                partial = Path(scratch) / name
                partial.mkdir()
                build(partial)
                partial.rename(folder)
    return folder


def _run(command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@functools.cache
def emulator():
    """emulate.cpp as a ctypes library."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = HERE / "emulate.cpp"
    folder = kept("emulator", lambda to: _run([compiler, *HOST_FLAGS, source, "-o", to / "emulator.so"]), compiler, sources=[source])
    return ctypes.CDLL(str(folder / "emulator.so"))


def _headers(home):
    folders = (home / "include", *home.glob("targets/*/include"))
    return next((f for f in folders if (f / "cuda_runtime_api.h").exists()), None)


def _home():
    """The folder of the CUDA toolkit, or None."""
    found = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), found and Path(found).resolve().parents[1],
             "/usr/local/cuda"]
    return next((Path(h) for h in homes if h and (Path(h) / "bin" / "nvcc").exists() and _headers(Path(h))), None)


def nvcc():
    """The compiler; where it or the sources are missing, the test is skipped."""
    if not CUDA.is_dir():
        pytest.skip("the sources (csrc/cuda) are not here: an installed package is tested")
    home = _home()
    if home is None:
        pytest.skip("no nvcc: GPU code is not compiled here")
    return home / "bin" / "nvcc"


@functools.cache
def compiled(arch=ARCH):
    """The folder with every unit as PTX, cubin, object and ptxas report (.txt) for sm_``arch``."""
    compiler = nvcc()

    def build(to):
        for unit in UNITS:
            with tempfile.TemporaryDirectory() as scratch:
                options = [*NVCC_FLAGS, f"-arch=sm_{arch}", "-Xptxas", "-v", "-Xcompiler", "-fPIC"]
                options += ["--keep", "--keep-dir", scratch]
                log = _run([compiler, *options, "-c", CUDA / f"{unit}.cu", "-o", to / f"{unit}.o"], cwd=scratch)
                (to / f"{unit}.txt").write_text(log)
                shutil.copy(Path(scratch) / f"{unit}.ptx", to)
                shutil.copy(next(Path(scratch).glob(f"{unit}*.cubin")), to / f"{unit}.cubin")

    return kept(f"sm_{arch}", build, str(compiler), NVCC_FLAGS)


def resources(report):
    """{kernel: (registers, stack, spill stores, spill loads)} of a ptxas report; kernels by their mangled names."""
    pattern = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
                         r".*?Used (\d+) registers", re.S)
    return {m[1]: (int(m[5]), int(m[2]), int(m[3]), int(m[4])) for m in pattern.finditer(report)}


def _linked(name, options, sources, *extra):
    """The objects of all units, linked with C++ sources of this folder, as a ctypes library."""
    objects = compiled()
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{_headers(_home())}", *sources]
    command += [objects / f"{unit}.o" for unit in UNITS]
    folder = kept(name, lambda to: _run([*command, *options, "-o", to / f"{name}.so"]), str(compiler), options, *extra, sources=sources)
    lib = ctypes.CDLL(str(folder / f"{name}.so"))
    lib.launch_kernel.restype, lib.launch_parameters.restype, lib.launch_size.restype = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64
    return lib


@functools.cache
def launcher():
    """The real launches linked with a runtime that records instead of launching (stub_runtime.cpp)."""
    return _linked("launcher", ["-Wl,-z,defs"], [HERE / "stub_runtime.cpp"])


@functools.cache
def recorded_ops():
    """The same with the ops of the CUDA library in front (recorded_ops.cpp). Their schemas must be defined before."""
    home = Path(torch.__file__).parent
    options = [*STABLE_FLAGS, f"-I{home / 'include'}", f"-I{sysconfig.get_path('include')}", "-Wl,-Bsymbolic", f"-L{home / 'lib'}",
               "-ltorch_cpu", "-lc10", "-ldl"]
    lib = _linked("recorded_ops", options, [HERE / "recorded_ops.cpp", HERE / "stub_runtime.cpp"], torch.__version__, sys.version)
    lib.take_allocated.restype = ctypes.c_void_p
    return lib
