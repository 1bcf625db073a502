"""The ops of ``torch.ops.fastdiff``, and which backend answers for a device.

``ops.schema`` holds every schema. ``fastdiff._C`` (CPU) and ``fastdiff._C_cuda`` implement them in C++; where one is
missing, broken or not wanted, the same schemas are implemented from Python with Triton or with the reference. The
choice is made once, when the package is imported; ``FASTDIFF_BACKEND`` (cpp, cuda, triton, reference) overrides it for
the devices that the named backend serves. All backends return the same bits.
"""

import importlib
import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata, resources

import torch

from .noise import unknown

__all__ = ["BACKENDS", "Choice", "backends", "checked_device", "chosen", "instruction_set", "no_gpu"]

BACKENDS = {"cpu": ("cpp", "triton", "reference"), "cuda": ("cuda", "triton", "reference")}
# Why the first of them comes first, where another could serve. tests/packaging/test_default.py and
# tests/proof/test_budgets.py hold it against the measurements.
DEFAULT = {"cuda": "the default: a call from Python costs less than an eighth of triton's (benchmarks/results/launch_cost.json), and dense "
           "16-bit samples take fewer instructions; masks, vectors and ragged samples take more (tests/budgets.json)"}
_LIBRARIES = {"cpp": "fastdiff._C", "cuda": "fastdiff._C_cuda"}
# The ops that work on tensors; the rest of the schemas is about the C++ code.
_PYTHON_OPS = ("step_", "normal_", "project_", "lift_", "edit_", "quantile_", "fold_in", "run_keys", "raw_words")
_log = logging.getLogger("fastdiff")


@dataclass(frozen=True)
class Choice:
    """One backend on one kind of device: is it usable, is it in use, and why (not)."""

    device: str
    backend: str
    usable: bool
    used: bool
    reason: str


def _schemas() -> list[str]:
    text = resources.files("fastdiff").joinpath("ops.schema").read_text()
    return [line.strip() for line in text.splitlines() if line.strip()]


def _try_library(backend: str) -> tuple[bool, str]:
    name = _LIBRARIES[backend]
    if backend == "cuda" and torch.version.cuda is None:
        return False, "this torch has no CUDA"
    if importlib.util.find_spec(name) is None:
        return False, f"{name} was not built"
    try:
        importlib.import_module(name)
    except Exception as error:  # a corrupt file, a missing symbol, another torch: never more than a log line
        first = (str(error).splitlines() or [""])[0]
        _log.warning("%s does not load (%s); another backend is used", name, first)
        return False, f"{name} does not load: {first}"
    return True, "loaded"


def _try_triton(device: str) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return False, "Triton runs CPU tensors only interpreted (TRITON_INTERPRET=1, for tests)"
    if device == "cuda" and torch.version.cuda is None:
        return False, "this torch has no CUDA"
    try:
        version = f"triton {metadata.version('triton')}"
    except metadata.PackageNotFoundError:
        version = "triton of unknown version"
    return True, f"{version}, interpreted: slow" if os.environ.get("TRITON_INTERPRET") == "1" else version


def _try(backend: str, device: str) -> tuple[bool, str]:
    if backend == "reference":
        if device == "cuda" and torch.version.cuda is None:
            return False, "this torch has no CUDA"
        return True, "NumPy, slow" if device == "cpu" else "NumPy on the host, with copies: slow"
    if backend == "triton":
        return _try_triton(device)
    return _try_library(backend)


def _implementation(backend: str, name: str):
    """A Python implementation of a schema, imported when it is first called: Triton takes a second."""

    def call(*args):
        module = importlib.import_module("fastdiff.kernels" if backend == "triton" else "fastdiff._reference_ops")
        return getattr(module, name)(*args)

    return call


def _register() -> list[Choice]:
    override = os.environ.get("FASTDIFF_BACKEND")
    names = sorted({b for served in BACKENDS.values() for b in served})
    if override is not None and override not in names:
        raise ValueError(f"FASTDIFF_BACKEND: {unknown('backend', override, names)}")

    choices, used, refused = [], {}, []
    for device, order in BACKENDS.items():
        if override in order:
            order = (override, *(b for b in order if b != override))
        for backend in order:
            if override not in (None, backend) and override in BACKENDS[device] and device in used:
                usable, reason = False, f"not tried: FASTDIFF_BACKEND={override}"
            else:
                usable, reason = _try(backend, device)
            if usable and device not in used:
                used[device] = backend
                if backend == override:
                    reason += f"; FASTDIFF_BACKEND={override}"
                elif backend == BACKENDS[device][0] and device in DEFAULT:
                    reason += f"; {DEFAULT[device]}"
            elif backend == override and device not in used:
                refused.append(f"{device} tensors: {reason}")
            choices.append(Choice(device, backend, usable, used.get(device) == backend, reason))
    if refused and override not in used.values():
        _log.warning("FASTDIFF_BACKEND=%s cannot serve %s", override, "; ".join(refused))

    defined = used["cpu"] == "cpp"  # _C defines the schemas; without it they are defined here
    if not defined and any(c.backend == "cpp" and c.usable for c in choices):
        defined = True
    for schema in () if defined else _schemas():
        _library.define(schema)
    for i, choice in enumerate(choices):
        if choice.used:
            choices[i] = _implement(choice)
    return choices


def _implement(choice: Choice) -> Choice:
    """Registers from Python what the backend in use does not bring along: everything, or what a library leaves to another backend."""
    key, others = choice.device.upper(), [b for b in BACKENDS[choice.device] if b not in _LIBRARIES]
    names = [n for n in _PYTHON_OPS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdiff::{n}", key)]
    by = choice.backend
    if by in _LIBRARIES and names:
        by = next(b for b in others if _try(b, choice.device)[0])
        choice = replace(choice, reason=f"{choice.reason}; {' and '.join(names)} by {by}")
    for name in names if choice.backend in _LIBRARIES else _PYTHON_OPS:
        _library.impl(name, _implementation(by, name), key, allow_override=True)
    return choice


_STEP_NAMES = ("coef", "meta", "row", "row_index", "keys", "scale", "bank", "bank_index", "bank_weight", "clip", "known",
               "mask", "status")


def _one_device(op: str, **tensors) -> None:
    """A call that mixes meta tensors with others comes to the fake kernel, which does nothing: it is refused."""
    given = [(name, t) for name, t in tensors.items() if isinstance(t, torch.Tensor)]
    for name, tensor in given:
        if tensor.device != given[0][1].device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {given[0][0]} on {given[0][1].device}: one device is taken")


def _fake_step_(inputs, outputs, ring, *rest) -> None:
    lists = {f"{what}[{i}]": t for what, tensors in (("outputs", outputs), ("inputs", inputs)) for i, t in enumerate(tensors)}
    _one_device("step_", **lists, ring=ring, **dict(zip(_STEP_NAMES, rest)))


def _fake_quantile_(out, clip, inputs, coef, row, row_index, scale, *numbers) -> None:
    _one_device("quantile_", **{f"inputs[{i}]": t for i, t in enumerate(inputs)}, out=out, clip=clip, coef=coef, row=row, scale=scale)


def _fake_in_place(op, names, *args) -> None:
    _one_device(op, **dict(zip(names, args)))


def _register_fakes() -> None:
    fake = torch.library.register_fake
    fake("fastdiff::step_", _fake_step_, lib=_library)
    fake("fastdiff::normal_", lambda out, keys: _one_device("normal_", out=out, keys=keys), lib=_library)
    for op, names in (("project_", ("out", "x", "basis", "index", "gain", "offset", "weight", "row")),
                      ("lift_", ("out", "basis", "index", "weight")), ("edit_", ("out", "h", "bank", "index", "weight"))):
        fake(f"fastdiff::{op}", partial(_fake_in_place, op, names), lib=_library)
    fake("fastdiff::quantile_", _fake_quantile_, lib=_library)
    fake("fastdiff::fold_in", lambda keys, data: keys.new_empty(
        (*torch.broadcast_shapes(keys.shape[:-1], data.shape), 2)), lib=_library)
    fake("fastdiff::run_keys", lambda seeds, streams, draws: seeds.new_empty(
        (*streams.shape, seeds.shape[0], 2)), lib=_library)
    fake("fastdiff::raw_words", lambda keys, count: keys.new_empty(
        (keys.shape[0], count), dtype=torch.int32), lib=_library)


_library = torch.library.Library("fastdiff", "FRAGMENT")
_choices = _register()
_register_fakes()


def backends() -> list[Choice]:
    """Every backend for every kind of device, with the reason why it is or is not used."""
    return list(_choices)


def chosen(device: str | torch.device) -> str:
    """The backend that answers for tensors of a device. Raises ``ValueError`` where none does."""
    kind = torch.device(device).type
    for choice in _choices:
        if choice.device == kind and choice.used:
            return choice.backend
    raise ValueError(f"device is {device}: {no_gpu() if kind in BACKENDS else ', '.join(BACKENDS) + ' is taken'}")


def checked_device(device: str | torch.device) -> torch.device:
    """The device, if a tensor can be made there. Raises ``ValueError`` with the reason where none can."""
    try:
        device = torch.device(device)
        if device.type not in (*BACKENDS, "meta"):
            raise ValueError(f"device is {device}: {', '.join(BACKENDS)} is taken")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        absent = no_gpu() if getattr(device, "type", None) == "cuda" else None
        raise ValueError(f"device is {device}: {absent or (str(error).splitlines() or [''])[0]}") from None
    return device


def no_gpu() -> str | None:
    """Why no CUDA tensor can be made here, in the words of torch; None where there is a GPU."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split("\n")[0].split(". ")[0].rstrip(".")
    return None


def instruction_set() -> str:
    """What the C++ code on the CPU uses: "avx512", "avx2" or "baseline"; "none" where it is not in use."""
    return torch.ops.fastdiff.isa() if chosen("cpu") == "cpp" else "none: the C++ backend is not in use"
