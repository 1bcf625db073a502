"""Results of a run that takes hours: each unit of work is kept as soon as it is there, and belongs to what made it.

A unit is drawn from a specification (a JSON object: method, setting, labels, seeds, ...). Its file is named by a checksum
of the specification and of the context (weights, data, sampler), so results of other networks are never read. The code
that made it is recorded in it (`code_checksum`): where that has changed since, the unit is stale, and the caller says
whether to draw it again or to keep it.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from fastdiff.files import written

__all__ = ["Differs", "Missing", "Stopped", "Store", "Unit", "check_context", "code_checksum", "file_checksum", "write_json"]


class Stopped(Exception):
    """The time that was given is over; everything so far is kept."""


class Missing(Exception):
    """A unit that is not there, in a run that draws nothing."""


class Differs(Exception):
    """Results that are there were made by other weights, data, settings or code than the present ones."""


def canonical(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def file_checksum(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@cache
def code_checksum(paths: tuple[Path, ...]) -> str:
    """Of what Python files do: comments, docstrings and layout do not count. Read once: what runs is what was imported."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        tree = ast.parse(Path(path).read_text())
        for node in ast.walk(tree):
            if (
                isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
                and ast.get_docstring(node) is not None
            ):
                node.body = node.body[1:] or [ast.Pass()]
        whole.update(path.name.encode() + ast.dump(tree).encode())
    return whole.hexdigest()[:16]


def write_json(path: Path, value) -> None:
    """Whole or not at all."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def check_context(found: dict | None, present: dict, where: str) -> None:
    """Raises `Differs`, naming each difference, if results were made in another context than the present one."""
    if found is None or found == present:
        return
    names = sorted(k for k in {*found, *present} if found.get(k) != present.get(k))
    lines = "\n".join(f"  {k}: {_short(found.get(k))} there, {_short(present.get(k))} now" for k in names)
    raise Differs(f"{where} holds results of another run:\n{lines}\n--fresh starts anew and overwrites them")


def _short(value) -> str:
    text = canonical(value)
    return text if len(text) <= 100 else text[:97] + "..."


class Unit:
    """One piece of work: its specification, what was found (a JSON object) and tensors."""

    def __init__(self, spec: dict, code: str, found: dict, tensors: dict):
        self.spec, self.code, self.found, self.tensors = spec, code, found, tensors


class Store:
    """A folder of units. stale: what to do with units of other code, "refuse", "redo" or "keep"."""

    def __init__(self, folder: Path, context: dict, stale: str = "refuse"):
        self.folder, self.context, self.stale = Path(folder), context, stale
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, spec: dict) -> Path:
        name = hashlib.sha256(canonical([self.context, spec]).encode()).hexdigest()[:24]
        return self.folder / f"{name}.safetensors"

    def get(self, spec: dict, code: str) -> Unit | None:
        """The unit, or None where it has to be drawn. Raises `Differs` for a stale one if the store refuses those."""
        path = self.path(spec)
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            held = json.loads(file.metadata()["unit"])
            if held["code"] != code:
                if self.stale == "redo":
                    return None
                if self.stale == "refuse":
                    what = spec.get("method", spec.get("what", "a unit"))
                    raise Differs(
                        f"results of {what} in {self.folder} were drawn by other code than the present: "
                        "--stale redo draws them again, --stale keep takes them as they are"
                    )
            return Unit(spec, held["code"], held["found"], {k: file.get_tensor(k) for k in file.keys()})

    def put(self, spec: dict, code: str, found: dict, tensors: dict) -> Unit:
        # In the order given: what is read back is what an uninterrupted run would have gone on with.
        meta = {"unit": json.dumps({"spec": spec, "context": self.context, "code": code, "found": found})}
        with written(self.path(spec)) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=meta)
        return Unit(spec, code, found, tensors)
