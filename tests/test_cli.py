"""The command line, as a person calls it."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

MODEL = """
def load():
    return lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

def nan():
    return lambda x, sigma: x * float("nan")
"""


def fastdiff(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", "fastdiff", *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def test_sample_writes_a_file_and_a_picture(folder):
    ran = fastdiff("sample", "--model", "model.py:load", "--shape", "1,8,8", "--count", "5", "--steps", "4", "--out",
                   "x.safetensors", "--png", "x.png", "--sampler", "euler_ancestral", "--option", "eta=0.5", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    x = load_file(folder / "x.safetensors")["samples"]
    assert x.shape == (5, 1, 8, 8) and torch.isfinite(x).all()
    assert (folder / "x.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("change, said", [
    ({"--model": "model.py"}, "FILE.py:NAME"),
    ({"--model": "modle.py:load"}, "modle.py is not there"),
    ({"--model": "model.py:laod"}, "no function 'laod'"),
    ({"--shape": "1,x"}, "1,x"),
    ({"--sampler": "dpmpp2m"}, "dpmpp_2m"),
    ({"--steps": "0"}, "0"),
    ({"--option": "eta"}, "NAME=VALUE"),
    ({"--out": "nowhere/x.safetensors"}, "nowhere is not a folder"),
    ({"--batch-size": "0"}, "1 or more"),
    ({"--model": "model.py:nan"}, "NaN"),
    ({"--colour": "red"}, "--colour"),
])
def test_mistakes_are_one_line(folder, change, said):
    options = {"--model": "model.py:load", "--shape": "1,8,8", "--count": "2", "--steps": "4", "--out": "x.safetensors", **change}
    ran = fastdiff("sample", *[word for pair in options.items() for word in pair], cwd=folder)
    assert ran.returncode == 2
    assert said in ran.stderr and "Traceback" not in ran.stderr, ran.stderr
    assert not list(folder.glob("*.safetensors*"))


def test_demo_outside_a_checkout_says_so(folder):
    ran = fastdiff("demo", cwd=folder)
    assert ran.returncode == 2 and "checkout" in ran.stderr
