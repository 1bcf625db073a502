"""fastdiff selftest, the testing API and the pytest plugin: what passes, what fails, and what is said of it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastdiff as fd
from fastdiff import _reference_ops, cli, testing
from fastdiff.selftest import selftest as run_selftest
from fastdiff.testing import backends
from fastdiff.testing.digests import folder
from fastdiff.testing.timing import Peak, Timing, measure

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: what is said without one cannot be seen")
CPP = pytest.mark.skipif(fd.ops.chosen("cpu") != "cpp", reason="the C++ backend is not in use")


def selftest(*arguments, cwd=None, **environment):
    command = [sys.executable, "-m", "fastdiff", "selftest", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


@NO_GPU
def test_without_a_gpu(tmp_path):
    """Passes on every backend that is here, says which are not and why, and writes what goes with a report."""
    ran = selftest("--json", "report.json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "bit by bit" in ran.stdout and "DIFFERS" not in ran.stdout
    why = "this torch has no CUDA" if torch.version.cuda is None else "no CUDA device was found"
    assert f"not run  cuda on cuda: {why}" in ran.stdout and f"not run  triton on cuda: {why}" in ran.stdout
    assert len(ran.stdout.splitlines()) < 24, "one screen"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["agree"] and not list(tmp_path.glob("*.tmp"))
    assert report["versions"]["torch"] == torch.__version__ and report["devices"] == {} == report["peaks"]
    used = {result["backend"].split(",")[0] for result in report["results"]}
    expected = {b.name for b in testing.available("cpu") if b.usable}
    assert used == expected and "reference" in used
    assert all(result["ok"] and len(result["digest"]) == 64 for result in report["results"])
    assert {c["backend"]: c["reason"] for c in report["backends"]}.keys() == {"cpp", "triton", "reference", "cuda"}


@pytest.fixture
def corrupted(tmp_path):
    """A copy of the golden files in which one digest is wrong."""
    copy = tmp_path / "golden"
    shutil.copytree(folder(), copy)
    content = json.loads((copy / "ops.json").read_text())
    entry = content["content"]["step_/in place"]
    entry["digest"] = entry["digest"][::-1]
    (copy / "ops.json").write_text(json.dumps(content))
    return copy


def test_a_wrong_digest_is_named(corrupted):
    ran = selftest("--backend", "reference", "--device", "cpu", "--golden", corrupted)
    assert ran.returncode == 1
    assert "reference on cpu, case 'step_/in place'" in ran.stdout and "the stored digest is wrong or old" in ran.stdout
    count = sum("reference" not in case.slow for case in backends.golden().cases)
    assert f"1 of {count} results are not the stored ones" in ran.stdout and "NO" in ran.stdout


def test_arguments_made_otherwise_are_told_from_wrong_results(corrupted):
    content = json.loads((corrupted / "ops.json").read_text())
    content["content"]["step_/in place"]["given"] = "0" * 16
    (corrupted / "ops.json").write_text(json.dumps(content))
    report = testing.run("cpu", backends=["reference"], cases=["step_/in place"], golden_folder=corrupted)
    assert not report.agree and "arguments were made otherwise" in report.failures[0].message


def wrong(**changes):
    """The reference, wrong in what is changed."""
    return SimpleNamespace(**{name: getattr(_reference_ops, name) for name in _reference_ops.__all__} | changes)


def one_bit_off(out, keys):
    _reference_ops.normal_(out, keys)
    if out.numel() > 40:
        out.view(torch.int32 if out.dtype == torch.float32 else torch.int16).flatten()[37:38].bitwise_xor_(1)


def refuses(*arguments):
    raise RuntimeError("the kernel was not launched\nand more")


@pytest.fixture
def wrong_backend(monkeypatch):
    def put(**changes):
        monkeypatch.setattr(backends, "_here", lambda backend: wrong(**changes))

    return put


def test_a_wrong_backend_is_named_with_case_and_element(wrong_backend):
    wrong_backend(normal_=one_bit_off)
    with pytest.raises(AssertionError) as error:
        testing.assert_backends_agree("cpu", backends=["reference"], cases=["normal_/float32 (2, 4, 16, 16)", "fold_in/"])
    said = str(error.value)
    assert said.startswith("1 of 4 results are not the stored ones:\nreference on cpu, case 'normal_/float32 (2, 4, 16, 16) contiguous': ")
    assert "out[0, 0, 2, 5] is " in said
    assert "1 of 2048 elements differ" in said


def test_the_command_ends_with_1_then(wrong_backend, monkeypatch, capsys, tmp_path):
    wrong_backend(fold_in=refuses)
    target = tmp_path / "report.json"
    options = ["--backend", "reference", "--device", "cpu", "--json", str(target), "--verbose"]
    monkeypatch.setattr(sys, "argv", ["fastdiff", "selftest", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "case 'fold_in/one key, one number': RuntimeError: the kernel was not launched\n" in said
    report = json.loads(target.read_text())
    assert report["agree"] is False and sum(not r["ok"] for r in report["results"]) == 3


@pytest.mark.parametrize("arguments, said", [
    (["--backend", "tritn"], "did you mean 'triton'"),
    (["--device", "mps"], "device 'mps' is not known"),
    (["--device", "nothing at all"], "--device is 'nothing at all'"),
    (["--golden", "nowhere"], "--golden is nowhere"),
    (["--golden", "empty"], "ops.json cannot be read: No such file"),
    (["--golden", ""], "ops.json cannot be read"),
    (["--golden", "list"], "has format that of a list: 1 is taken"),
    (["--golden", "hollow"], "has no content"),
    (["--golden", "undigested"], "'step_/in place' is not a digest"),
    (["--golden", "unplanned"], "is not whole"),
    (["--backend", "cuda", "--device", "cpu"], "on cpu: backend 'cuda' is not known"),
    (["--device", "cpu:3"], "device is cpu:3: cpu:0 is taken"),
    (["--json", "/proc/report.json"], "no file can be made in /proc"),
    (["--json", "nowhere/report.json"], "nowhere is not a folder"),
    (["--json", "pipe"], "not a plain file"),
    (["--golden", "old"], "another version"),
    (["--golden", "torn"], "is not JSON"),
])
def test_mistakes_are_one_line(tmp_path, arguments, said, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe")
    for name in ("old", "torn"):
        shutil.copytree(folder(), tmp_path / name)
    content = json.loads((tmp_path / "old" / "ops.json").read_text())
    del content["content"]["step_/in place"]
    (tmp_path / "old" / "ops.json").write_text(json.dumps(content))
    (tmp_path / "torn" / "plans.json").write_text("{")
    (tmp_path / "empty").mkdir()
    given = {"list": "[]", "hollow": '{"format": 1}', "undigested": '{"format": 1, "content": {"step_/in place": {"given": "0"}}}'}
    for name, text in given.items():
        shutil.copytree(folder(), tmp_path / name)
        (tmp_path / name / "ops.json").write_text(text)
    shutil.copytree(folder(), tmp_path / "unplanned")
    (tmp_path / "unplanned" / "plans.json").write_text('{"format": 1, "content": {"a plan": []}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastdiff", "selftest", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2 and said in printed.err and not printed.out
    assert len(printed.err.strip().splitlines()) == 1


@NO_GPU
def test_nothing_run_is_no_success():
    ran = selftest("--backend", "cuda")
    assert ran.returncode == 1 and "nothing was run" in ran.stdout
    with pytest.raises(RuntimeError, match="nothing was run on cuda: cuda on cuda: .*triton on cuda"):
        testing.assert_backends_agree("cuda")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="did you mean 'cpp'"):
        testing.assert_backends_agree("cpu", backends=["cp"])
    with pytest.raises(ValueError, match="case 'stepp/' is not known.*the nearest are 'step_/"):
        testing.run("cpu", cases=["fold_in/", "stepp/"])


@pytest.mark.parametrize("device, given, error, said", [
    ("cpu", {"cases": "step_/"}, TypeError, "cases is 'step_/': a list of beginnings"),
    ("cpu", {"backends": "cpp"}, TypeError, "backends is 'cpp': a list of names"),
    ("cpu", {"cases": [3]}, TypeError, "cases holds 3"),
    ("cpu", {"cases": []}, ValueError, "cases is empty"),
    ("cpu", {"backends": []}, ValueError, "backends is empty"),
    ("cpu", {"backends": ["cuda"]}, ValueError, "on cpu: backend 'cuda' is not known"),
    ("cuda", {"backends": ["cuda", "cpp"]}, ValueError, "on cuda: backend 'cpp' is not known"),
    ("cpuu", {}, ValueError, "device 'cpuu' is not known: did you mean 'cpu'"),
    ("cpu:3", {}, ValueError, "cpu:0 is taken"),
    ("cpu", {"time_limit": "10"}, TypeError, "time_limit is '10': a positive number"),
    ("cpu", {"time_limit": True}, TypeError, "time_limit is True"),
    ("cpu", {"time_limit": 0}, ValueError, "time_limit is 0: a positive number"),
    ("cpu", {"time_limit": float("nan")}, ValueError, "time_limit is nan"),
    ("cpu", {"time_limit": float("inf")}, ValueError, "time_limit is inf"),
])
def test_arguments_are_refused_before_anything_runs(device, given, error, said, monkeypatch):
    monkeypatch.setattr(backends, "_here", lambda backend: pytest.fail("something was run"))
    with pytest.raises(error, match=said):
        testing.assert_backends_agree(device, **given)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_process_that_hangs_or_dies_is_a_failure(monkeypatch, capsys):
    said = "^1 backend did not come to an end:\ntriton-interpreted on cpu: did not end within 0.01 seconds"
    with pytest.raises(AssertionError, match=said):
        testing.assert_backends_agree("cpu", backends=["triton-interpreted"], cases=["fold_in/"], time_limit=0.01)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(AssertionError, match="its process ended with code 1: no message"):
        testing.assert_backends_agree("cpu", backends=["triton-interpreted"], cases=["fold_in/"])
    assert not run_selftest("cpu", "triton-interpreted")
    printed = capsys.readouterr().out
    assert "FAILED   triton-interpreted on cpu: its process ended with code 1" in printed and "DIFFERS" not in printed
    assert "1 backend did not come to an end" in printed


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_a_process_of_its_own_finds(corrupted):
    report = testing.run("cpu", backends=["triton-interpreted"], cases=["step_/in place", "fold_in/"], golden_folder=corrupted)
    assert [r.case for r in report.failures] == ["step_/in place"] and len(report.results) == 5
    assert "the stored digest is wrong" in report.failures[0].message


@CPP
def test_another_backend_in_front_does_not_hide_one():
    """FASTDIFF_BACKEND=reference: C++ is not loaded there, and is run in a process of its own."""
    code = "from fastdiff import testing as t; print({r.backend for r in t.assert_backends_agree('cpu', cases=['fold_in/']).results})"
    env = {**os.environ, "FASTDIFF_BACKEND": "reference"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    assert "'cpp, " in ran.stdout and "'reference'" in ran.stdout


@NO_GPU
def test_a_process_that_cannot_be_what_is_asked_says_why():
    """That is no difference in bits. Asked here as if the backend had not been tried."""
    missing = backends.Backend("cuda", "cuda", True, "")
    report = backends._elsewhere(missing, "cuda", backends.golden(), [], 60, False, None)
    reason = next(c.reason for c in fd.ops.backends() if (c.device, c.backend) == ("cuda", "cuda"))
    assert not report.results and [str(missing) for missing in report.not_run] == [f"cuda on cuda: {reason}"]


def test_interpreted_triton_is_left_out_where_triton_runs_on_a_gpu(monkeypatch):
    """It takes a minute, and proves less; asked for by name, it is run."""
    monkeypatch.setattr(backends, "_usable", lambda kind, name: (name != "cuda", "not built"))
    monkeypatch.setattr(backends, "_here", lambda backend: _reference_ops)
    run_case = backends.run_case
    monkeypatch.setattr(backends, "run_case", lambda case, ops, device: run_case(case, ops, "cpu"))
    some = {"cases": ["fold_in/"]}
    found = testing.run(**some)
    assert {(r.device, r.backend) for r in found.results} >= {("cuda", "triton"), ("cpu", "reference")}
    assert "triton-interpreted" not in {r.backend for r in found.results}
    assert any(n.backend == "triton-interpreted" and "by name" in n.why for n in found.not_run)
    assert {r.backend for r in testing.run("cpu", backends=["triton-interpreted"], **some).results} == {"triton-interpreted"}
    assert "triton-interpreted" in {r.backend for r in testing.run("cpu", **some).results}


def test_times_count_each_byte_once():
    times = {t.case: t for t in measure(torch.ops.fastdiff, "cpu", "cpp", elements=4096)}
    assert times["normals, float32"].moved == 4 * 4096 and times["normals, float16"].moved == 2 * 4096
    assert times["step, float32, noise"].moved == 12 * 4096
    assert times["step, float32 latent, float16 model"].moved == (4 + 2 + 4 + 2) * 4096
    assert len(times) == 6 and all(t.seconds > 0 and t.bandwidth > 0 for t in times.values())


def test_the_report_of_a_gpu(monkeypatch, tmp_path, capsys):
    """What is printed and written where there is a GPU, from the CPU's results under its name."""
    monkeypatch.setattr(backends, "_usable", lambda kind, name: (name == "cuda", "not built"))
    monkeypatch.setattr(backends, "_here", lambda backend: torch.ops.fastdiff)
    run_case = backends.run_case
    monkeypatch.setattr(backends, "run_case", lambda case, ops, device: run_case(case, ops, "cpu"))
    monkeypatch.setattr(backends, "measure", lambda ops, device, name: [
        Timing(device, name, t.case, t.moved, t.seconds) for t in measure(ops, "cpu", name, 4096)])  # fmt: skip
    monkeypatch.setattr("fastdiff.selftest.peak", lambda device: Peak(1e12, "a test"))
    target = tmp_path / "report.json"
    assert run_selftest("cuda", report_to=target)
    printed = capsys.readouterr().out
    assert "of the roofline" in printed and "1000 GB/s, from a test" in printed and "normals, float16" in printed
    assert "not run  triton on cuda: not built" in printed
    report = json.loads(target.read_text())
    assert [t["case"] for t in report["times"]] == [t.case for t in measure(torch.ops.fastdiff, "cpu", "cpp", 64)]
    for t in report["times"]:
        assert t["roofline"] == pytest.approx(t["moved"] / t["seconds"] / 1e12)
    assert report["peaks"] == {"cuda": {"bandwidth": 1e12, "source": "a test"}}


def test_times_that_fail_leave_the_digests(monkeypatch):
    def no_memory(*arguments):
        raise MemoryError("no memory left\nand more")

    monkeypatch.setattr(backends, "_usable", lambda kind, name: (name == "cuda", "not built"))
    monkeypatch.setattr(backends, "_here", lambda backend: torch.ops.fastdiff)
    run_case = backends.run_case
    monkeypatch.setattr(backends, "run_case", lambda case, ops, device: run_case(case, ops, "cpu"))
    monkeypatch.setattr(backends, "measure", no_memory)
    report = testing.run("cuda", cases=["fold_in/"], timed=True)
    assert report.agree and len(report.results) == 3 and not report.times
    assert "cuda on cuda: times: no memory left" in map(str, report.not_run)


# ---- the plugin


@pytest.fixture
def project(tmp_path):
    """Somebody's project, and the plugin's module on its path."""
    found = importlib.util.find_spec("pytest_fastdiff")
    shutil.copy(found.origin, tmp_path / "pytest_fastdiff.py")
    return tmp_path


def pytest_in(project, test):
    (project / "test_bits.py").write_text(test)
    env = {**os.environ, "PYTHONPATH": str(project), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-p", "pytest_fastdiff", "-rs", "-q", "test_bits.py"], cwd=project,
                          capture_output=True, text=True, env=env)


def test_the_fixture_passes_and_fails(project):
    ran = pytest_in(project, """
def test_the_cpu(fastdiff_golden):
    report = fastdiff_golden("cpu", backends=["reference"], cases=["fold_in/", "raw_words/"])
    assert len(report.results) == 7

def test_a_name(fastdiff_golden):
    fastdiff_golden("cuda", backends=["cuda", "tritn"])  # refused, not skipped, where there is no GPU
""")
    assert ran.returncode == 1 and "1 failed, 1 passed" in ran.stdout, ran.stdout
    assert "did you mean" in ran.stdout


@NO_GPU
def test_the_fixture_skips_where_there_is_no_such_device(project):
    ran = pytest_in(project, "def test_the_gpu(fastdiff_golden):\n    fastdiff_golden('cuda')\n")
    assert ran.returncode == 0 and "1 skipped" in ran.stdout, ran.stdout
    assert "cuda: " in ran.stdout and "triton: " in ran.stdout


def test_the_plugin_brings_nothing_heavy(project):
    code = "import pytest_fastdiff, sys; assert not {'torch', 'numpy', 'fastdiff'} & set(sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
