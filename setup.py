"""Builds fastdiff._C (CPU) and, where nvcc and a CUDA build of torch are, fastdiff._C_cuda. Metadata: pyproject.toml.

FASTDIFF_PURE_PYTHON=1   builds nothing: Triton or the reference does the work
FASTDIFF_SKIP_CUDA=1     leaves _C_cuda out
FASTDIFF_SANITIZE=1      AddressSanitizer and UBSan, in a build folder of its own: python setup.py build (see Makefile)
TORCH_CUDA_ARCH_LIST     as in every torch extension; default 8.0;9.0;10.0+PTX
"""

import os
import platform
import subprocess
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)


def flag(name):
    return os.environ.get(name, "0") not in ("", "0")


PURE, SANITIZE = flag("FASTDIFF_PURE_PYTHON"), flag("FASTDIFF_SANITIZE")
# One binary for torch 2.11 and later on Python 3.10 and later.
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
LIMITED = "cp310"

# No contraction: the rounding of every operation is part of the result. No fast-math, for the same reason; errno of the
# square root is nothing that anyone reads.
CXX = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
       "-Wno-maybe-uninitialized", "-Wno-uninitialized", *STABLE]  # the intrinsics of gcc 12 warn about themselves
NVCC = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden", *STABLE]
LINK = []
if SANITIZE:
    CXX += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    LINK += ["-fsanitize=address,undefined"]
else:
    CXX += ["-O3", "-g0"]

ext_modules, cmdclass = [], {}
if not PURE:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    BUILD = Path("build") / ("sanitize" if SANITIZE else f"{platform.machine()}-torch{torch.__version__.split('+')[0]}")
    GENERATED = BUILD / "generated"

    def write_schemas():
        """fastdiff/ops.schema, the one copy of every schema, as C++ string literals."""
        lines = [line.strip() for line in Path("fastdiff/ops.schema").read_text().splitlines()]
        text = "".join(f'R"schema({line})schema",\n' for line in lines if line and not line.startswith("#"))
        target = GENERATED / "fastdiff_schemas.inc"
        if not target.exists() or target.read_text() != text:
            GENERATED.mkdir(parents=True, exist_ok=True)
            target.write_text(text)

    class Build(BuildExtension):
        """Objects stay in ``build``, editable installs included, so that a second build takes seconds."""

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(BUILD)

        def run(self):
            write_schemas()
            super().run()

        def build_extension(self, ext):
            self.build_temp = str(BUILD / ext.name)  # a ninja file for each library
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            super().build_extension(ext)

    def sources(*patterns):
        return sorted(str(p) for pattern in patterns for p in Path("csrc").glob(pattern))

    headers = sources("*.h", "*/*.h", "*/*.cuh") + ["fastdiff/ops.schema"]
    ext_modules.append(CppExtension(
        "fastdiff._C", sources("*.cpp", "cpu/*.cpp"), depends=headers, include_dirs=[str((ROOT / GENERATED))],
        extra_compile_args={"cxx": CXX}, extra_link_args=LINK, py_limited_api=True))

    def cuda_libraries():
        """The folder of libcudart, where nvcc on the path is a wrapper and torch's guess from its place has none."""
        said = subprocess.run([Path(CUDA_HOME) / "bin" / "nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        tops = [line.split("=", 1)[1].strip() for line in said.splitlines() if line.startswith("#$ TOP=")]
        folders = [Path(top) / lib for top in (CUDA_HOME, *tops) for lib in ("lib64", "lib")]
        return [str(folder.resolve()) for folder in folders if list(folder.glob("libcudart.*"))][:1]

    cuda_sources = sources("cuda/*.cu", "cuda/*.cpp")
    if cuda_sources and not flag("FASTDIFF_SKIP_CUDA") and not SANITIZE and torch.version.cuda and CUDA_HOME:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        ext_modules.append(CUDAExtension(
            "fastdiff._C_cuda", cuda_sources, depends=headers, library_dirs=cuda_libraries(),
            extra_compile_args={"cxx": [*CXX, "-DUSE_CUDA"], "nvcc": [*NVCC, "-DUSE_CUDA"]}, extra_link_args=LINK, py_limited_api=True))
    cmdclass["build_ext"] = Build

# kernels/ installs as fastdiff.kernels: a top-level package of the name `kernels` would shadow another project's.
kernels = ["fastdiff.kernels", *(f"fastdiff.kernels.{name}" for name in find_packages("kernels"))]
# The golden digests belong to the tests, and to `fastdiff selftest` of an installed package. The pytest plugin installs outside
# of the package: pytest imports it at every start, and a module in fastdiff would bring torch with it.
moved = {"fastdiff.kernels": "kernels", "fastdiff.golden": "tests/golden", "pytest_fastdiff": "fastdiff/testing/plugin"}
own = find_packages(include=["fastdiff", "fastdiff.*"], exclude=["fastdiff.testing.plugin"])
setup(
    packages=own + kernels + ["fastdiff.golden", "pytest_fastdiff"],
    package_dir=moved,
    package_data={"fastdiff": ["ops.schema", "py.typed"], "fastdiff.golden": ["*.json"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={} if PURE else {"bdist_wheel": {"py_limited_api": LIMITED}},
)
