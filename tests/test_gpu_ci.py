"""The workflow for GPU runners parses, and every command in it exists."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from fastdiff import cli

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW, PAGE = ROOT / "docs" / "ci" / "gpu.yml", ROOT / "docs" / "gpu-ci.md"

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
if not WORKFLOW.is_file():
    pytest.skip("runs from a checkout", allow_module_level=True)
JOBS = yaml.safe_load(WORKFLOW.read_text())["jobs"]
STEPS = [(job, step) for job, content in JOBS.items() for step in content["steps"]]
COMMANDS = [(job, line) for job, step in STEPS for line in step.get("run", "").splitlines() if line.strip()]
PROSE = re.sub(r"```.*?```", "", PAGE.read_text(), flags=re.S)
PAGE_COMMANDS = [("page", line.strip()) for line in re.findall(r"^    (\S.*)$", PROSE, re.M)]


def check_fastdiff(arguments):
    command = typer.main.get_command(cli.app)
    name, *rest = arguments
    assert name in command.commands, f"fastdiff has no command {name}"
    command.commands[name].make_context(name, rest)  # raises for an option that is not there


def check_make(arguments):
    if not (ROOT / "Makefile").is_file():
        pytest.skip("runs from a checkout")
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    (target,) = arguments
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_pytest(arguments):
    configuration = (ROOT / "pyproject.toml").read_text()
    with_value = {"-m", "--junitxml"}
    words = iter(arguments)
    for word in words:
        if word in with_value:
            value = next(words)
            assert word != "-m" or re.search(rf'^    "{value}: ', configuration, re.M), f"no marker {value}"
        elif word.startswith("$"):
            assert any(word.removeprefix("$") in step.get("env", {}) for _, step in STEPS), f"{word} is not set"
        else:
            assert word == "-rs" or (ROOT / word).exists(), f"{word} is not there"


def check_pip(arguments):
    """fastdiff comes from the folder that its source is checked out to: by name it would be somebody else's package."""
    install, *what = arguments
    assert install == "install" and "." in what, "the reader's project is installed too"
    folders = {step["with"]["path"] for job, step in STEPS if "FASTDIFF_REPOSITORY" in str(step.get("with", {}).get("repository"))
               and "path" in step["with"]}
    local = {word.removeprefix("./") for word in what if word.startswith("./")}
    assert local and local <= folders and set(what) - {f"./{f}" for f in folders} == {".", "pytest"}, f"pip {arguments}"


CHECKS = {"fastdiff": check_fastdiff, "make": check_make, "pytest": check_pytest, "pip": check_pip,
          "python3": lambda arguments: arguments == ["-m", "venv", ".venv"] or pytest.fail(f"python3 {arguments}")}


@pytest.mark.parametrize("job, line", [*COMMANDS, *PAGE_COMMANDS], ids=lambda value: value)
def test_every_command_exists(job, line):
    program, *arguments = shlex.split(line)
    CHECKS[program.removeprefix(".venv/bin/")](arguments)


@pytest.mark.parametrize("line", ["fastdiff selftes", "fastdiff selftest --jsn x", "make golde", "pytest -m gpus", "pytest tets",
                                  "pytest $TETS", "pip install fastdiff . pytest", "pip install ./fastdiff-sauce . pytest",
                                  "pip install ./fastdiff-source fastdiff . pytest"])
def test_a_command_that_does_not_exist_is_found(line):
    program, *arguments = line.split()
    with pytest.raises(Exception, match="selftes|jsn|golde|gpus|tets|TETS|pip"):
        CHECKS[program](arguments)


def test_selftest_the_gpu_tests_and_the_benchmark_are_run():
    source = [line for job, line in COMMANDS if job == "source"]
    for wanted in ("fastdiff selftest", "pytest -m gpu", "make bench"):
        assert any(wanted in line for line in source), wanted


def test_the_readers_tests_are_run_from_a_path_of_theirs():
    (line,) = [line for job, line in COMMANDS if job == "installed" and "pytest" in line and "pip" not in line]
    assert line.endswith('"$FASTDIFF_TESTS"') and "-k" not in line
    (given,) = [step["env"]["FASTDIFF_TESTS"] for job, step in STEPS if "FASTDIFF_TESTS" in step.get("env", {})]
    assert given == "${{ vars.FASTDIFF_TESTS || 'tests' }}"
    for variable in re.findall(r"vars\.(\w+)", WORKFLOW.read_text()):
        assert f"`{variable}`" in PAGE.read_text()


def test_what_is_uploaded_was_written():
    for job, step in STEPS:
        if "upload-artifact" in step.get("uses", ""):
            assert step["if"] == "always()"
            lines = " ".join(line for j, line in COMMANDS if j == job)
            makefile = (ROOT / "Makefile").read_text() if (ROOT / "Makefile").is_file() else None
            for path in step["with"]["path"].split():
                written = path in lines.split() or "make bench" in lines and (makefile is None or path in makefile)
                assert written, f"{job} uploads {path}, which nothing writes"


def test_runners_and_repository_are_the_readers():
    for content in JOBS.values():
        assert content["runs-on"] == "${{ fromJSON(vars.GPU_RUNNER) }}" and content["timeout-minutes"]
    assert "://" not in WORKFLOW.read_text()
