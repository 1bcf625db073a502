"""How long the ops take on a GPU, beside the time that their bytes need at the memory's peak."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..reference import Layout
from .inputs import DTYPES

__all__ = ["Peak", "Timing", "device_facts", "measure", "peak"]

ELEMENTS = 2**24  # of a tensor: far more than a cache holds
REPEATS = 30


@dataclass(frozen=True)
class Timing:
    """One kernel: seconds is the median of one launch, moved the bytes read and written once each."""

    device: str
    backend: str
    case: str
    moved: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.moved / self.seconds


@dataclass(frozen=True)
class Peak:
    """Bytes a second that the memory can move, and how that is known."""

    bandwidth: float
    source: str


def peak(device) -> Peak:
    """From the device's properties (two transfers a clock); from a measured copy where they say nothing."""
    properties = torch.cuda.get_device_properties(device)
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    if clock > 0 and width > 0:
        return Peak(2 * clock * 1e3 * width / 8, f"{width} bits at {clock / 1e6:.3f} GHz, two transfers a clock")
    a = torch.zeros(ELEMENTS * 2, device=device)
    b = torch.empty_like(a)
    return Peak(2 * a.numel() * a.element_size() / median(lambda: b.copy_(a), device), "a measured copy")


def median(function: Callable[[], object], device, repeats: int = REPEATS) -> float:
    """Median seconds of one call: by events of the device on CUDA, by the clock elsewhere."""
    for _ in range(5):
        function()
    if torch.device(device).type != "cuda":
        taken = []
        for _ in range(repeats):
            before = time.perf_counter()
            function()
            taken.append(time.perf_counter() - before)
        return statistics.median(taken)
    with torch.cuda.device(device):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            start.record()
            function()
            end.record()
        torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def measure(ops, device, backend: str, elements: int = ELEMENTS) -> list[Timing]:
    """Times of the normals and of typical steps: float32, and a float32 latent beside a 16-bit model."""
    shape = (16, max(elements // 16, 1))
    keys = ops.run_keys(torch.arange(shape[0], device=device), torch.ones(1, 1, dtype=torch.int64, device=device),
                        torch.zeros(1, 1, dtype=torch.int64, device=device))

    def tensors(*names):
        return [torch.full(shape, 0.5, dtype=DTYPES[name], device=device) for name in names]

    def timed(case, function, touched):
        moved = sum(t.numel() * t.element_size() for t in touched)
        return Timing(str(device), backend, case, moved, median(function, device))

    def step(inputs, outputs, noisy):
        layout = Layout(len(inputs), len(outputs), 0, int(noisy))
        coef = torch.full((1, layout.width), 0.5, device=device)
        meta = torch.tensor([[-1, 0, -1, -1]], dtype=torch.int32, device=device)
        rest = (keys if noisy else None, *[None] * 8)
        return lambda: ops.step_(inputs, outputs, None, coef, meta, None, 0, *rest)

    results = []
    for name in ("float32", "float16"):
        (out,) = tensors(name)
        results.append(timed(f"normals, {name}", lambda: ops.normal_(out, keys[0, 0]), [out]))
    for name, dtypes in (("float32", ("float32",) * 2), ("float32 latent, float16 model", ("float32", "float16"))):
        for noisy in (False, True):
            inputs = tensors(*dtypes)
            outputs = [inputs[0], *tensors(*dtypes[1:])][: 1 if name == "float32" else 2]
            results.append(timed(f"step, {name}{', noise' * noisy}", step(inputs, outputs, noisy), [*inputs, *outputs]))
    return results


def device_facts(device) -> dict:
    """What a report says about a GPU."""
    properties = torch.cuda.get_device_properties(device)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "memory_clock_rate", "memory_bus_width",
             "L2_cache_size")
    facts = {name: getattr(properties, name) for name in names if hasattr(properties, name)}
    return {**facts, "driver": _driver(), "cuda": torch.version.cuda}


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: nvidia-smi is not there"
    try:
        said = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True,
                              timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return (said.stdout.strip().splitlines() or ["unknown: nvidia-smi said nothing"])[0]
