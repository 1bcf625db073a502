"""`make matrix`: one wheel, the oldest and the newest Python, torch and Triton, and those between: the golden digests agree.

The wheel is that of `make cuda-build`. Every environment is kept in build/matrix (20 GB for all; minutes the first time); in
each, `fastdiff selftest` runs outside the checkout. Writes benchmarks/results/matrix.json; ends with 1 where anything differs.

    python tests/packaging/matrix.py [--only TEXT]     TEXT: a part of a row's name, as torch2.11
"""

import argparse
import glob
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "matrix"
RESULT = ROOT / "benchmarks" / "results" / "matrix.json"

# Every pair of extremes, and everything between at least once. What "newest" is depends on the Python: torch 2.14.1 and Triton
# 3.8.0 are the last that serve 3.10.
ROWS = [
    ("3.10", "2.11.0", "3.6.0"),
    ("3.10", "2.14.1", "3.8.0"),
    ("3.11", "2.13.0", "3.7.1"),  # as requirements.txt has them
    ("3.12", "2.12.1", "3.8.0"),
    ("3.13", "2.11.0", "3.9.0"),
    ("3.13", "2.15.0", "3.9.0"),
    ("3.13", "2.15.0", "3.6.0"),
]
# torch without the gigabytes of CUDA libraries that it asks for: it finds those of a neighbour. Its other needs are these.
NEEDS = ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools<82"]
OURS = ["numpy", "scipy", "safetensors", "tqdm", "typer", "rich", "matplotlib"]


@dataclass(frozen=True)
class Row:
    python: str
    torch: str
    triton: str

    @property
    def name(self) -> str:
        return f"python{self.python}-torch{self.torch}-triton{self.triton}"

    @property
    def folder(self) -> Path:
        return WORK / self.name

    @property
    def lender(self) -> Path | None:
        """The environment whose CUDA libraries torch finds; None where it has its own."""
        if self.torch != NEWEST:
            return ROOT / "build" / "cuda" / "venv"
        first = next(row for row in (Row(*r) for r in ROWS) if row.torch == NEWEST)
        return None if first == self else first.folder


NEWEST = max((torch for _, torch, _ in ROWS), key=lambda version: tuple(map(int, version.split("."))))


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)


def interpreter(version: str) -> str | None:
    """python3.x on the path, or one of pyenv's."""
    kept = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python3")))
    return kept[-1] if kept else shutil.which(f"python{version}")


def install(row: Row, python: str) -> None:
    """Makes the environment of a row, unless it is there."""
    done = row.folder / ".installed"
    if done.exists():
        return
    shutil.rmtree(row.folder, ignore_errors=True)
    empty = WORK / "no-constraints.txt"  # the versions asked for are installed, whatever this machine's pip prefers
    empty.write_text("")
    env = {**os.environ, "PIP_CONSTRAINT": str(empty), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    own = row.lender is None
    # With dependencies, Triton is what torch asks for; where it has to be another, it takes its place.
    steps = [[python, "-m", "venv", row.folder],
             [row.folder / "bin" / "python", "-m", "pip", "install", "-qq", *([] if own else ["--no-deps"]),
              f"torch=={row.torch}", f"triton=={row.triton}"],
             [row.folder / "bin" / "python", "-m", "pip", "install", "-qq", *NEEDS, *OURS]]
    for command in steps:
        made = run(*command, env=env)
        if made.returncode:
            raise SystemExit(f"{row.name}: {' '.join(map(str, command))}\n{made.stdout}{made.stderr}")
    done.touch()


def libraries(row: Row) -> str:
    return os.pathsep.join(sorted(glob.glob(str(row.lender or row.folder) + "/lib/python*/site-packages/nvidia/*/lib")))


def measured(row: Row, wheel: Path) -> dict:
    """Installs the wheel and runs the self-test: what was found, by name."""
    found = {"asked": vars(row)}
    python = interpreter(row.python)
    if python is None:
        return {**found, "not_run": f"there is no Python {row.python}"}
    install(row, python)
    run(row.folder / "bin" / "python", "-m", "pip", "install", "-qq", "--no-deps", "--force-reinstall", wheel).check_returncode()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTDIFF_", "TRITON_", "PYTHON"))}
    report = row.folder / "selftest.json"
    report.unlink(missing_ok=True)
    env["LD_LIBRARY_PATH"] = libraries(row)
    tested = run(row.folder / "bin" / "fastdiff", "selftest", "--json", report, cwd=row.folder, env=env)
    if not report.is_file():
        return {**found, "failed": ((tested.stderr or tested.stdout).strip().splitlines() or ["no output"])[-1]}
    said = json.loads(report.read_text())
    cases: dict[str, list[bool]] = {}
    for result in said["results"]:
        cases.setdefault(result["backend"], []).append(result["ok"])
    return {**found, "code": tested.returncode, "versions": said["versions"],
            "instruction set": said["machine"]["instruction set"],
            "libraries": {b["backend"]: b["reason"] for b in said["backends"] if b["backend"] in ("cpp", "cuda")},
            "equal": {backend: [sum(several), len(several)] for backend, several in cases.items()},
            "differ": [f"{r['backend']}, {r['case']}: {r['message']}" for r in said["results"] if not r["ok"]],
            "not_run": [f"{n['backend']} on {n['device']}: {n['why']} (cases: {len(n['cases']) or 'all'})" for n in said["not_run"]]}


def good(found: dict) -> bool:
    """Did both C++ libraries load, and did the one, interpreted Triton and the reference run and agree in everything?"""
    if found.get("code") != 0 or found["differ"] or not found["libraries"]["cpp"].startswith("loaded"):
        return False
    names = {backend.split(",")[0] for backend in found["equal"]}
    return names >= {"cpp", "triton-interpreted", "reference"} and found["libraries"]["cuda"].startswith(("loaded", "this torch has no"))


def show(rows: list[dict]) -> None:
    table = Table("python", "torch", "triton", "numpy", "digests equal", "not run", title="one wheel, the same digests")
    for found in rows:
        if "equal" not in found:
            failed = found.get("failed")
            table.add_row(*found["asked"].values(), "", "FAILED" if failed else "", failed or found["not_run"])
            continue
        versions = [found["versions"][name] for name in ("python", "torch", "triton", "numpy")]
        equal = "\n".join(f"{backend}: {agree} of {count}" for backend, (agree, count) in found["equal"].items())
        table.add_row(*versions, equal, "\n".join(found["not_run"]))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="part of a row's name")
    only = parser.parse_args().only
    wheels = list((ROOT / "build" / "cuda" / "dist").glob("*.whl"))
    if not wheels:
        raise SystemExit("there is no wheel in build/cuda/dist: make cuda-build makes it, where there is nvcc")
    WORK.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in (Row(*r) for r in ROWS):
        if only in row.name:
            print(f"matrix: {row.name}", flush=True)
            rows.append(measured(row, wheels[0]))
    if not rows:
        raise SystemExit(f"--only is {only!r}: a part of one of {', '.join(Row(*r).name for r in ROWS)} is taken")
    show(rows)
    failed = [found for found in rows if not good(found)]
    if not only:
        RESULT.write_text(json.dumps({"command": "make matrix", "wheel": wheels[0].name, "rows": rows}, indent=1) + "\n")
        print(f"matrix: {RESULT.relative_to(ROOT)}")
    for found in failed:
        why = [found.get("failed", ""), str(found.get("libraries", "")), *found.get("differ", [])[:5]]
        print("matrix: NOT EQUAL:", Row(**found["asked"]).name, *why, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
