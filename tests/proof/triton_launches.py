"""Launches of the Triton backend, recorded without a GPU.

The ops of ``fastdiff.kernels`` run through their own code, Triton's specialization and caches included, on CPU tensors. What
is swapped is the driver below them: it takes whatever target it is told, loads nothing, and keeps what arrives at the
launcher. The parameter buffer is packed as Triton's launcher packs it: constants and None dropped, tuples flattened,
tensors as their addresses, two null pointers to scratch memory at the end.
"""

import hashlib
import importlib
import os
import pkgutil
import struct
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import fastdiff.kernels as kernels
from fastdiff.kernels import launch
from proof.execute import Recording
from ptx import Launch, parse

# The package shows functions; the modules behind them, which launch:
_NAMES = [found.name for found in pkgutil.iter_modules(kernels.__path__)]
_MODULES = [m for m in (importlib.import_module(f"fastdiff.kernels.{name}") for name in _NAMES) if hasattr(m, "run") and m is not launch]
step_module = importlib.import_module("fastdiff.kernels.step")

NAME = "triton"
OPS = ("step_", "normal_", "project_", "lift_", "edit_", "quantile_", "fold_in", "run_keys", "raw_words")
FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
           "fp32": "f", "f32": "f", "fp64": "d"}
SCRATCH = 2  # pointers that Triton appends to a kernel's parameters: global scratch memory, profiling


class _Utils:
    """Loads a kernel by remembering its PTX; its handle is a number."""

    def __init__(self):
        self.loaded, self.files = [], None

    def about_to_load(self, module, function, name, metadata_group, hash):
        self.files = metadata_group

    def load_binary(self, name, binary, shared, device):
        path = next(p for p in map(Path, self.files.values()) if p.suffix == ".ptx")
        self.loaded.append((name, path.read_text(), binary))
        return None, len(self.loaded) - 1, 0, 0, 1024  # module, function, registers, spills, most threads of a block

    def get_device_properties(self, device):
        return {"max_shared_mem": 48 * 1024}


class _Launcher:
    def __init__(self, source, metadata):
        self.signature, self.metadata = list(source.signature.values()), metadata

    def __call__(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *args):
        kernel, values = _kernel(*_driver.utils.loaded[function]), list(_flat(self.signature, args))
        _driver.tensors += [value for kind, value in values if kind.startswith("*") and value is not None]
        parameters = pack(values, kernel)
        block = (32 * self.metadata.num_warps, 1, 1)
        _driver.launches.append(Launch(kernel, (x, y, z), block, parameters, self.metadata.shared))


class _Driver:
    """A device for each target: its number is the target's, so that every target has JIT caches of its own."""

    launcher_cls = _Launcher

    def __init__(self):
        self.utils, self.arch, self.launches, self.tensors = _Utils(), None, [], []

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


_driver = _Driver()
_parsed, _compiled = {}, {}


def _kernel(name, text, cubin):
    key = hashlib.sha256(text.encode()).digest()
    if key not in _parsed:
        kernel = _parsed[key] = parse(text).kernels[name]
        _compiled[id(kernel)] = text, cubin
    return _parsed[key]


def compiled(launch):
    """(PTX, cubin) of the kernel of a launch."""
    return _compiled[id(launch.kernel)]


def _flat(signature, values):
    """(type, value) of each argument that a kernel is given."""
    for kind, value in zip(signature, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def pack(values, kernel):
    """The parameter bytes of a launch: each (type, value) where the kernel has it, then null pointers to scratch memory."""
    scratch = len(kernel.params) - len(values)
    assert 0 <= scratch <= SCRATCH, (kernel.params, values)
    buffer = bytearray(kernel.param_bytes)
    for (kind, value), (_, at, size, _) in zip([*values, *[("*i8", None)] * scratch], kernel.params, strict=True):
        if kind.startswith("*"):
            kind, value = "u64", 0 if value is None else value.data_ptr()
        data = struct.pack("<" + FORMATS[kind], value)
        assert len(data) == size, (kind, size)
        buffer[at : at + size] = data
    return bytes(buffer)


@contextmanager
def _recording(arch):
    """Kernels that are launched here are compiled for sm_``arch`` and kept."""
    assert not launch.interpreted(), "compiled and interpreted Triton do not mix: TRITON_INTERPRET must not be set"
    before, _driver.arch, _driver.launches, _driver.tensors = driver._active, arch, [], []

    def run(kernel, device, *args, **options):
        launch.run(kernel, torch.device("cuda", arch), *args, **options)  # only the device is another one

    cache = Path(tempfile.gettempdir()) / f"fastdiff-tests-{os.getuid()}" / "triton"
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(cache)))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: arch))
        for module in _MODULES:
            stack.enter_context(mock.patch.object(module, "run", run))
        hook = knobs.runtime.kernel_load_start_hook
        hook.add(_driver.utils.about_to_load)
        stack.callback(hook.remove, _driver.utils.about_to_load)
        driver.set_active(_driver)
        stack.callback(setattr, driver, "_active", before)
        yield


def record(arch, op, *args):
    """Runs an op of ``fastdiff.kernels``."""
    with _recording(arch):
        result = getattr(kernels, op)(*args)
    return Recording(result, _driver.launches, _driver.tensors)


def record_unchecked(arch, op, *args):
    """An op on vectors without a look at its indices: on a device they may lie outside their tables, which is refused to CPU
    tensors."""
    with ExitStack() as stack:
        for module in _MODULES:
            for name in (name for name in vars(module) if name.startswith("check_")):
                stack.enter_context(mock.patch.object(module, name))
        return record(arch, op, *args)


def record_unchecked_step(arch, case):
    """``step_`` without its checks: on a device, an index may lie outside its table, which the op refuses to CPU tensors."""
    with _recording(arch):
        programs, args, options = step_module.arguments(step_module.prepare(*case.args()), *case.args())
        step_module.run(step_module.step_kernel, case.coef.device, programs, *args, **options)
    return Recording(None, _driver.launches, _driver.tensors)
