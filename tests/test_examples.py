"""Every example in the README and in a docstring runs."""

import contextlib
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import fastdiff as fd
from counter.emulated import Gpu
from counter.graphs import EmulatedGraphs

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("fastdiff.kernels", "fastdiff._C", "fastdiff.__main__")
MODULES = [m.name for m in pkgutil.walk_packages(fd.__path__, "fastdiff.") if not m.name.startswith(OPTIONAL)]


@pytest.mark.parametrize("name", ["fastdiff", *MODULES])
def test_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def blocks():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        if page.is_file():
            for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)):
                yield pytest.param(code, id=f"{page.name}-{i}")


@contextlib.contextmanager
def emulated_gpu(monkeypatch):
    with Gpu(latent=1) as gpu:
        EmulatedGraphs(gpu, monkeypatch)
        yield


@pytest.mark.parametrize("code", list(blocks()))
def test_readme_and_docs(code, tmp_path, monkeypatch, request):
    """Where there is no GPU, an example for one runs on emulated CUDA tensors."""
    emulated = 'device="cuda"' in code and not torch.cuda.is_available()
    monkeypatch.chdir(tmp_path)
    known = set(fd.SAMPLERS)
    request.addfinalizer(lambda: [fd.SAMPLERS.pop(name) for name in set(fd.SAMPLERS) - known])
    with emulated_gpu(monkeypatch) if emulated else contextlib.nullcontext():
        exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_everything_public_is_there_and_documented():
    for name in fd.__all__:
        thing = getattr(fd, name)
        assert getattr(thing, "__doc__", None) or isinstance(thing, dict), name
