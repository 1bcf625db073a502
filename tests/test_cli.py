"""The command line, as a person calls it."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff.files import written

MODEL = """
def load():
    return lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

def slow():
    import pathlib, time

    def model(x, sigma):
        pathlib.Path("called").touch()
        time.sleep(0.2)
        return x

    return model

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
    ({"--device": "cude"}, "cude"),
    ({"--option": "rho=0"}, "rho is 0"),
    ({"--sampler": "euler_ancestral", "--option": "s_noise=nan"}, "s_noise is nan"),
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


def interruptible():
    """What a shell starts in the background is deaf to Ctrl-C, and so are its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_with_130_and_no_file(folder):
    (folder / "x.safetensors").write_text("what was there before")
    command = [sys.executable, "-m", "fastdiff", "sample", "--model", "model.py:slow", "--shape", "1,8,8", "--steps", "500",
               "--out", "x.safetensors"]
    run = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible)
    deadline = time.monotonic() + 60
    while not (folder / "called").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert "Traceback" not in said and said.endswith("\nfastdiff: stopped\n")
    assert (folder / "x.safetensors").read_text() == "what was there before"
    assert not list(folder.glob("*.tmp"))


def test_ctrl_c_during_selftest(folder):
    """Interrupted while interpreted Triton runs in a process of its own, which a terminal interrupts too."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text("import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "fastdiff", "selftest", "--backend", "triton-interpreted", "--json", "report.json"]
    run = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                           preexec_fn=interruptible, env={**os.environ, "PYTHONPATH": str(folder)})
    deadline = time.monotonic() + 60
    while not (folder / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate(timeout=60)
    assert run.returncode == 130 and said == ("", "\nfastdiff: stopped\n"), said
    assert not (folder / "report.json").exists() and not list(folder.glob("*.tmp"))


@pytest.fixture
def broken_triton(folder):
    """The environment of somebody whose triton cannot be imported."""
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text("raise OSError('libtriton.so is torn')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize("arguments, code, said", [
    (["doctor"], 0, "bit by bit"),
    (["selftest", "--backend", "triton-interpreted"], 1,
     "not run  triton-interpreted on cpu: triton does not load: OSError: libtriton.so is torn"),
])
def test_a_triton_that_does_not_load(broken_triton, folder, arguments, code, said):
    command = [sys.executable, "-m", "fastdiff", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=broken_triton)
    assert ran.returncode == code and said in ran.stdout, ran.stdout + ran.stderr
    assert "DIFFERS" not in ran.stdout and "Traceback" not in ran.stderr


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_written_files_are_as_any_new_file_and_leave_others_alone(folder, umask):
    (folder / "x.json.tmp").write_text("the user's own")
    before = os.umask(umask)
    try:
        with written(folder / "x.json") as first, written(folder / "x.json") as second:
            assert first != second and first.parent == second.parent == folder
            first.write_text("first")
            second.write_text("second")
        with written(folder / "x.safetensors") as temporary:
            save_file({"x": torch.zeros(2)}, temporary)
    finally:
        os.umask(before)
    assert (folder / "x.json").read_text() == "first"  # the last one to end
    assert {(folder / name).stat().st_mode & 0o777 for name in ("x.json", "x.safetensors")} == {0o666 & ~umask}
    with pytest.raises(KeyboardInterrupt), written(folder / "x.json") as third:
        third.write_text("third")
        raise KeyboardInterrupt
    assert sorted(p.name for p in folder.iterdir()) == ["model.py", "x.json", "x.json.tmp", "x.safetensors"]
    assert (folder / "x.json").read_text() == "first" and (folder / "x.json.tmp").read_text() == "the user's own"


@pytest.mark.parametrize("option", ["--out", "--png"])
def test_what_is_not_a_plain_file_is_not_replaced(folder, option):
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    for target in ("pipe", "sub"):
        options = {"--model": "model.py:slow", "--shape": "1,8,8", "--out": "x.safetensors", option: target}
        ran = fastdiff("sample", *[word for pair in options.items() for word in pair], cwd=folder)
        assert ran.returncode == 2 and "not a plain file" in ran.stderr, ran.stderr
        assert not (folder / "called").exists()
    assert (folder / "pipe").is_fifo() and (folder / "sub").is_dir()
