"""What the tests of plans share: a loop over rows by the reference, a toy model, and k-diffusion's sampling module."""

import functools
import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest

from fastdiff.reference import EXACT, FLOAT64, step
from fastdiff.samplers.stage import Noise
from fastdiff.samplers.table import STREAMS

SIZE = 24  # elements of a sample
NAMES = {number: name for name, number in STREAMS.items()}


class Noises(dict):
    """N(stream, draw) -> (batch, SIZE) float32, drawn when first asked for, from one seed."""

    def __init__(self, seed=0, batch=2, size=SIZE):
        super().__init__()
        self.seed, self.shape = seed, (batch, size)

    def __missing__(self, address):
        number = STREAMS[address.stream]
        self[address] = np.random.default_rng([self.seed, number, address.draw]).standard_normal(self.shape, np.float32)
        return self[address]


def run(
    plan,
    model,
    noises,
    *,
    start=None,
    arithmetic=FLOAT64,
    known=None,
    mask=None,
    bank=None,
    bank_index=None,
    bank_weight=None,
    trace=None,
):
    """Run a plan by the reference. model(buffer, sigma, time) -> output, all (B, n). Returns the last base.

    trace: a list that gets (row, base before it, model input before it, d) for each row that calls the model.
    """
    exact = arithmetic is EXACT
    coef = plan.coef.astype(np.float32) if exact else plan.coef
    batch, n = noises.shape
    buffers = {name: np.full((batch, n), np.nan, arithmetic.dtype) for name in ("x", "in", "carry", "out", "uncond")}
    if start is not None:
        buffers["x"] = start.astype(arithmetic.dtype)
    ring = np.full((plan.ring, batch, n), np.nan, arithmetic.dtype) if plan.ring else None
    for r in range(len(plan)):
        if plan.calls_model[r]:
            buffers["out"] = model(buffers[plan.model_input], plan.sigmas[r], plan.times[r]).astype(arithmetic.dtype)
        drawn = [noises[Noise(NAMES[int(s)], int(i))] for s, i in zip(plan.streams[r], plan.draws[r])]
        result = step(
            [buffers[name] for name in plan.inputs],
            coef,
            plan.meta,
            r,
            outputs=("float32",) * len(plan.outputs),
            ring=ring,
            noise=np.stack(drawn) if drawn else None,
            known=known,
            mask=mask,
            bank=bank,
            bank_index=bank_index,
            bank_weight=bank_weight,
            arithmetic=arithmetic,
        )
        if trace is not None and plan.calls_model[r]:
            trace.append((r, buffers["x"], buffers[plan.model_input], result.d))
        buffers.update(zip(plan.outputs, result.outputs))
        ring = result.ring
    return buffers["x"]


def denoise(x, sigma, v=0.25):
    """A smooth nonlinear D(x, sigma): posterior mean of a mixture N(-1, v), N(1, v), its neighbours mixed in.

    x: (B, n) NumPy array or tensor-like, at level sigma (VE). In float64, whatever comes in.
    """
    x = np.asarray(x, np.float64)
    total = v + float(sigma) ** 2
    return (v * x + float(sigma) ** 2 * np.tanh((x + 0.3 * np.roll(x, 1, axis=-1)) / total)) / total


def predict(prediction, x_t, sigma, alpha, sigma_data=0.5):
    """What a model with this prediction returns for the toy D, at x_t = alpha (x0 + sigma n)."""
    x_t = np.asarray(x_t, np.float64)
    d, level = denoise(x_t / alpha, sigma), alpha * sigma
    n = (x_t - alpha * d) / level
    return {
        "epsilon": lambda: n,
        "sample": lambda: d,
        "denoised": lambda: d,
        "v": lambda: alpha * n - level * d,
        "flow": lambda: n - d,
        "edm": lambda: (
            (d - sigma_data**2 / (sigma**2 + sigma_data**2) * x_t) * np.hypot(sigma, sigma_data) / (sigma * sigma_data)
        ),
    }[prediction]()


def relative(ours, theirs) -> float:
    """The largest difference over the largest value."""
    theirs = np.asarray(theirs, np.float64)
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


@functools.cache
def k_diffusion():
    """k-diffusion's `sampling` module, without the package's own `__init__`, which imports training code.

    What its imports lack is stubbed while it is imported, and only then; no function that is tested uses it.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion")
    needed = {
        "torchvision": ["transforms"],
        "torchvision.transforms": ["functional"],
        "torchvision.transforms.functional": [],
        "torchdiffeq": ["odeint"],
        "torchsde": ["BrownianTree"],
    }
    missing = [name for name in needed if importlib.util.find_spec(name.split(".")[0]) is None]
    stubs = {"k_diffusion": types.ModuleType("k_diffusion"), **{name: types.ModuleType(name) for name in missing}}
    for name, stub in stubs.items():
        stub.__path__ = list(spec.submodule_search_locations) if name == "k_diffusion" else []
        for attribute in needed.get(name, []):
            setattr(stub, attribute, stubs.get(f"{name}.{attribute}"))
    try:
        sys.modules.update(stubs)
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in [*stubs, "k_diffusion.sampling", "k_diffusion.utils"]:
            sys.modules.pop(name, None)
