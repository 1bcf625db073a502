"""Brownian noise beside k-diffusion's with torchsde: what a step of DPM++ SDE costs around the model, as shipped."""

import functools
import importlib
import importlib.util
import sys
import types
from unittest import mock

import pytest
import torch

import fastdiff as fd
from benchmarks.timing import interleaved

STEPS = 20
SHAPES = [(4, 4, 64, 64), (64, 3, 32, 32)]


def our_loop(sampler, shape, out):
    plan = fd.plan(sampler, schedule="edm", sigma_min=0.03, sigma_max=14.6, steps=STEPS, prediction="denoised", noise="brownian")
    run = fd.Stepper(plan, shape, seeds=0)

    def loop():
        run.restart(0)
        while not run.done:
            run.step(out)

    return loop


@functools.cache
def k_diffusion_sampling():
    """Its `sampling` module alone: the package's own `__init__` imports training code. torchsde is the real one; what only
    other functions use (an ODE solver, image transforms) may be missing."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or importlib.util.find_spec("torchsde") is None:
        pytest.skip("k-diffusion or torchsde is not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    absent = ("torchdiffeq", "torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    stubs = {name: mock.MagicMock() for name in absent if importlib.util.find_spec(name.split(".")[0]) is None}
    sys.modules.update({**stubs, "k_diffusion": package})
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in [*stubs, "k_diffusion", "k_diffusion.sampling", "k_diffusion.utils"]:
            sys.modules.pop(name, None)


def their_loop(sampler, shape, out):
    sampling = k_diffusion_sampling()
    sigmas, start = sampling.get_sigmas_karras(STEPS, 0.03, 14.6), torch.randn(shape) * 14.6

    def loop():
        torch.manual_seed(0)  # how many normals a tree draws depends on its seed
        getattr(sampling, f"sample_{sampler}")(lambda x, sigma: out, start, sigmas, disable=True)

    return loop


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "dpmpp_sde"])
@torch.no_grad()
def test_brownian_step_beside_k_diffusion(benchmark, ratio, sampler, shape):
    out = torch.randn(shape)
    ours = our_loop(sampler, shape, out)
    times = interleaved({"ours": ours, "theirs": their_loop(sampler, shape, out)}, seconds=4, least=3, warmup=1)
    per_step = {k: tuple(t / STEPS for t in v) for k, v in times.items()}
    ratio(f"{sampler}: Brownian step, beside k-diffusion", shape, per_step["ours"][0], per_step["theirs"][0], 30, per_step)
    benchmark.pedantic(ours, rounds=3)
