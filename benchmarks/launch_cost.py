"""What one call of ``step_`` costs on the host, by GPU backend, up to the driver: python -m benchmarks.launch_cost

No GPU is needed: the launch itself is left out on both sides. C++ is csrc/cuda/library.cpp with its checks, binding and launcher,
registered for CPU tensors over a runtime that keeps launches instead of making them (tests/cuda/recorded_ops.cpp). Triton is the
function that serves CUDA tensors, called through the dispatcher as there, Triton's own launch path included, over a driver
whose launcher does nothing: the real one unpacks the arguments once more, so that this is the least it can cost. Both are
called again and again with the same tensors, as a sampler does: Triton's kernels are compiled and its preparations are known.

Writes benchmarks/results/launch_cost.json, which says why one backend is the default (fastdiff/ops.py).
"""

import importlib
import json
import sys
from importlib import resources
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import fastdiff as fd
from benchmarks.timing import interleaved
from fastdiff.files import written

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "launch_cost.json"
CALLS = 200  # in one measurement
SHAPE, ROWS = (4, 4, 64, 64), 20
CUDA = torch.device("cuda", 0)


class NoLaunch:
    """A driver that compiles for sm_90 and launches nothing."""

    launches = 0

    class launcher_cls:
        def __init__(self, source, metadata):
            pass

        def __call__(self, *args):
            NoLaunch.launches += 1

    class utils:
        @staticmethod
        def load_binary(name, binary, shared, device):
            return None, 0, 0, 0, 1024  # module, function, registers, spills, most threads of a block

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 48 * 1024}

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return CUDA


def library(namespace):
    """A library with the schemas of the ops under a name of its own."""
    made = torch.library.Library(namespace, "DEF")
    for schema in resources.files("fastdiff").joinpath("ops.schema").read_text().splitlines():
        if schema.strip():
            made.define(schema)
    return made


def arguments(device, dtype, inputs, noises, ring):
    """The call of one step of a sampler: base and model output in, the next base out in place, status and all."""
    layout = fd.reference.Layout(inputs + ring, 1, 0, noises)
    tensors = [torch.zeros(SHAPE, dtype=dtype, device=device) for _ in range(inputs)]
    integers = {"dtype": torch.int64, "device": device}
    return (tensors, [tensors[0]], torch.zeros(ring, *SHAPE, device=device) if ring else None,
            torch.zeros(ROWS, layout.width, device=device), torch.zeros(ROWS, 4, dtype=torch.int32, device=device), None, 3,
            torch.zeros(ROWS, noises, SHAPE[0], 2, **integers) if noises else None, *[None] * 7,
            torch.zeros(2, dtype=torch.int32, device=device))  # fmt: skip


STEPS = {
    "ddim, float32": (torch.float32, 2, 0, 0),
    "ddpm, float16": (torch.float16, 2, 1, 0),
    "dpmpp_2m_sde, float32": (torch.float32, 2, 1, 2),
}


def cuda_op():
    """(step_ of the CUDA library over a recording runtime, the launches since the last time as a function)"""
    sys.path.insert(0, str(ROOT / "tests" / "cuda"))
    import cuda_build

    kept = library("fastdiff_cuda_recorded")
    lib = cuda_build.recorded_ops()

    def launches():
        count = lib.launch_count()
        lib.forget_launches()
        return count

    return torch.ops.fastdiff_cuda_recorded.step_.default, launches, kept


def triton_op():
    """The same for step_ of fastdiff.kernels, registered as fastdiff/ops.py registers it, but for tensors without memory: since
    they are no CPU tensors, the code takes the path of CUDA tensors."""
    from fastdiff.kernels import launch, step_

    module = importlib.import_module("fastdiff.kernels.step")

    def run(kernel, device, *args, **options):
        launch.run(kernel, CUDA, *args, **options)

    driver.set_active(NoLaunch())
    mock.patch.object(torch.cuda, "current_device", lambda: 0).start()
    mock.patch.object(module, "run", run).start()
    mock.patch.object(module, "check_step").start()  # looks at addresses, in the first call alone
    kept = library("fastdiff_triton_unlaunched")
    kept.impl("step_", step_, "Meta")

    def launches():
        count, NoLaunch.launches = NoLaunch.launches, 0
        return count

    return torch.ops.fastdiff_triton_unlaunched.step_.default, launches, kept


def main():
    sides = {"cuda": ("cpu", *cuda_op()), "triton": ("meta", *triton_op())}

    def many(device, op, launches, _kept, options):
        args = arguments(device, *options)

        def calls():
            for _ in range(CALLS):
                op(*args)
            assert launches() == CALLS

        return calls

    rows = []
    for name, options in STEPS.items():
        times = interleaved({backend: many(*side, options) for backend, side in sides.items()}, seconds=3)
        us = {backend: [round(t / CALLS * 1e6, 2) for t in several] for backend, several in times.items()}
        rows.append({"step": name, "shape": list(SHAPE), "us": {backend: t[0] for backend, t in us.items()},
                     "quartiles_us": {backend: t[1:] for backend, t in us.items()}})
        cuda, in_triton = us["cuda"][0], us["triton"][0]
        print(f"{name:24} cuda {cuda:6.2f} us   triton {in_triton:6.2f} us   ratio {in_triton / cuda:5.1f}")
    about = {"command": "python -m benchmarks.launch_cost", "torch": torch.__version__, "triton": triton.__version__,
             "python": sys.version.split()[0],
             "left_out": "the driver's launch; with triton, also the unpacking of the arguments for it"}
    with written(RESULT) as temporary:
        temporary.write_text(json.dumps({**about, "calls": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
