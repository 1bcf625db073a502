"""Importing: beside another distribution named ``kernels``, with broken libraries, with and without C++."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastdiff as fd

ROOT = Path(__file__).resolve().parents[2]


def python(code, *, cwd=ROOT, flags=(), **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("FASTDIFF_BACKEND", "FASTDIFF_ISA", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, env={**env, **environment}, capture_output=True, text=True)


@pytest.fixture
def fake_kernels(tmp_path):
    """A distribution named ``kernels``, as the Hugging Face package of that name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'the real one'\n")
    (tmp_path / "kernels-1.0.dist-info").mkdir()
    (tmp_path / "kernels-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 1.0\n")
    return tmp_path


def test_the_name_kernels_stays_free(fake_kernels, tmp_path):
    """Installed, fastdiff has no top-level package ``kernels``."""
    code = "import fastdiff, fastdiff.noise, kernels; print(kernels.get_kernel)"
    ran = python(code, cwd=tmp_path, PYTHONPATH=str(fake_kernels))
    assert ran.returncode == 0 and "the real one" in ran.stdout, ran.stderr


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="runs from a checkout")
def test_from_the_checkouts_root(fake_kernels):
    """There the folder shadows the distribution, and says so instead of failing in some importer's middle."""
    ran = python("import kernels", PYTHONPATH=str(fake_kernels))
    assert ran.returncode != 0
    assert "ImportError" in ran.stderr and "fastdiff.kernels" in ran.stderr
    ran = python("import fastdiff, diffusers, sys; from diffusers import DDIMScheduler; DDIMScheduler(); print('works')",
                 PYTHONPATH=str(fake_kernels))
    if "No module named 'diffusers'" in ran.stderr:
        pytest.skip("diffusers is not installed")
    assert "works" in ran.stdout, ran.stderr


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="runs from a checkout")
def test_pytest_from_the_root_sees_the_real_distribution(fake_kernels, tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text("def test_it():\n    import kernels, fastdiff\n    assert kernels.get_kernel == 'the real one'\n")
    pytest_script = Path(sysconfig.get_path("scripts")) / "pytest"
    ran = subprocess.run([pytest_script, "-q", "-p", "no:xdist", str(test), "-c", str(ROOT / "pyproject.toml")], cwd=ROOT,
                         env={**os.environ, "PYTHONPATH": str(fake_kernels)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def copy_of_the_package(folder, libraries):
    """The installed package's files in a folder of their own, the C++ libraries replaced by ``libraries``."""
    package = Path(fd.__file__).parent
    target = folder / "fastdiff"
    skip = {"__pycache__"}
    for file in package.rglob("*"):
        if file.is_file() and not skip & set(file.parts) and file.suffix != ".so":
            there = target / file.relative_to(package)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(file.read_bytes())
    for name, content in libraries.items():
        (target / name).write_bytes(content)
    return folder


def without_the_installed_one(where):
    """Options under which python sees the copy in ``where`` and every package but the installed fastdiff: -S leaves out
    the .pth files of editable installs, whose finders know fastdiff._C."""
    return {"flags": ["-S"], "PYTHONPATH": os.pathsep.join([str(where), *(p for p in sys.path if p.endswith("-packages"))])}


CODE = "import fastdiff as fd; print(fd.__file__, fd.ops.chosen('cpu'), fd.randn((1, 4), seeds=0).flatten().tolist())"


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(2000)], ids=["empty", "text", "torn"])
def test_a_corrupt_library_is_one_log_line(tmp_path, content):
    suffix = ".abi3.so"
    where = copy_of_the_package(tmp_path, {"_C" + suffix: content})
    ran = python(CODE, cwd=where, **without_the_installed_one(where))
    assert ran.returncode == 0, ran.stderr
    assert str(where) in ran.stdout and "reference" in ran.stdout
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "fastdiff._C does not load" in lines[0], ran.stderr
    assert ran.stdout.split("[")[1] == python(CODE, cwd=tmp_path.parent).stdout.split("[")[1]  # the same bits


def test_without_libraries(tmp_path):
    where = copy_of_the_package(tmp_path, {})
    ran = python(CODE, cwd=where, **without_the_installed_one(where))
    assert ran.returncode == 0 and "reference" in ran.stdout and not ran.stderr.strip(), ran.stderr


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_override(backend):
    extra = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    ran = python(CODE, FASTDIFF_BACKEND=backend, **extra)
    assert ran.returncode == 0, ran.stderr
    assert f" {backend} " in ran.stdout


def test_an_override_that_cannot_be_met_says_why():
    ran = python(CODE, FASTDIFF_BACKEND="triton")
    assert ran.returncode == 0 and "TRITON_INTERPRET" in ran.stderr
    ran = python(CODE, FASTDIFF_BACKEND="cpp2")
    assert ran.returncode != 0 and "'cpp2'" in ran.stderr and "did you mean 'cpp'" in ran.stderr


def test_doctor():
    ran = subprocess.run([sys.executable, "-m", "fastdiff", "doctor"], capture_output=True, text=True, cwd=ROOT.parent)
    assert ran.returncode == 0, ran.stderr
    for said in ("backend", "cpp", "triton", "reference", "cuda", "instruction set", "threads", "bit by bit"):
        assert said in ran.stdout, ran.stdout
