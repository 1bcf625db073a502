"""On emulated CUDA tensors: a fused step is one launch, and waits for nothing."""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from counter.emulated import LAUNCHES, Counts, Gpu
from integrations.schedulers import CONFIGS, made, model

SHAPE = (2, 3, 12, 16)
STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NAMES = [
    "ddpm",
    "ddpm clip",
    "dpm++ sde",
    "cosine dpm",
    "ddim",
    "ddim eta",
    "euler",
    "euler ancestral",
    "heun",
    "dpm++ 2m",
    "dpm++ 3m sde",
    "unipc bh2",
    "sa solver",
    "pndm plms",
    "deis 2",
    "lms",
    "flow euler",
    "lcm",
]


def of(t):
    return t.untyped_storage().data_ptr()


@pytest.mark.parametrize("begin", [True, False], ids=["begin index", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_one_launch_a_step(name, begin, monkeypatch):
    """Setting up, the timesteps are read once. The first step brings the rows to the device, and makes the keys. From the second
    on, a step is launches of the op and nothing else."""
    # emulated tensors have no storage of their own: their inner ones tell what is a view of what
    monkeypatch.setattr(fd.integrations.timesteps, "_share", lambda a, b: of(a.inner) == of(b.inner))
    fused = fd.integrations.diffusers.fuse(made(name), noise="philox")
    x = torch.linspace(-1, 1, 2 * 3 * 12 * 16).view(SHAPE)
    counts = []
    with Gpu(2 * 3 * 12 * 16) as gpu:
        x = x.to("cuda")
        fused.set_timesteps(STEPS, device="cuda")
        if begin and hasattr(fused, "set_begin_index"):
            fused.set_begin_index(0)
        for t in fused.timesteps:
            output = model(fused.scale_model_input(x, t) if hasattr(fused, "scale_model_input") else x, t)
            gpu.take()
            x = fused.step(output, t, x, return_dict=False, **CONFIGS[name].step)[0]
            counts.append(gpu.take())
    first, *rest = counts
    assert first.reads == 0 and first.d2h == 0
    for c in rest:
        launches = c.ops.get("fastdiff.step_", 0)
        assert launches == (2 if name == "sa solver" else 1), c  # it keeps its noise too: a fourth output
        assert c.numbers() == {**Counts().numbers(), "big": launches}, c


@pytest.mark.parametrize("name", ["ddpm", "euler ancestral", "dpm++ 2m sde"])
def test_noise_of_torch_is_one_launch_more(name, monkeypatch):
    monkeypatch.setattr(fd.integrations.timesteps, "_share", lambda a, b: of(a.inner) == of(b.inner))
    fused = fd.integrations.diffusers.fuse(CONFIGS[name].make())
    counts = []
    with Gpu(2 * 3 * 12 * 16) as gpu:
        x = torch.linspace(-1, 1, 2 * 3 * 12 * 16).view(SHAPE).to("cuda")
        fused.set_timesteps(STEPS, device="cuda")
        for t in fused.timesteps:
            output = model(fused.scale_model_input(x, t), t)
            gpu.take()
            x = fused.step(output, t, x, return_dict=False)[0]
            counts.append(gpu.take())
    assert not any(c.reads or c.d2h for c in counts)
    for c in counts[1:]:
        draws = sum(number for op, number in c.ops.items() if "randn" in op)
        assert draws <= 1 and c.numbers() == {**Counts().numbers(), "big": 1 + draws}, c


@pytest.mark.parametrize("name", ["ddpm threshold", "ddim threshold", "dpm++ threshold"])
def test_dynamic_thresholding_is_its_quantile_more(name, monkeypatch):
    for c in _launches(name, monkeypatch)[1:]:
        assert set(c.ops) == {"fastdiff.quantile_", "fastdiff.step_"} and c.ops["fastdiff.step_"] == 1, c
        assert c.numbers() == {**Counts().numbers(), "big": 1 + LAUNCHES["fastdiff.quantile_"]}, c


@pytest.mark.parametrize("name", ["ddim", "dpm++ 2m", "heun", "flow euler", "ddpm"])
@pytest.mark.parametrize("how, more", [("bank", ("project_",)), ("lift", ("project_", "lift_"))])
def test_a_steered_step_is_its_projection_more(name, how, more, monkeypatch):
    data = fd.randn((50, *SHAPE[1:]), seeds=3)
    alignment = fd.steering.NoiseAlignment.fit({"up": data[:20] + 1}, data, rank=2)
    counts = _launches(name, monkeypatch, steering=[alignment.at(1.0, (0.0, float("inf")), rank=2, how=how)])
    for c in counts[1:]:
        launched = {op: number for op, number in c.ops.items() if op.startswith("fastdiff.")}
        assert launched == {f"fastdiff.{op}": 1 for op in ("step_", *more)}, c
        assert (c.reads, c.d2h, c.h2d, c.waits) == (0, 0, 0, 0), c


def _launches(name, monkeypatch, **options):
    monkeypatch.setattr(fd.integrations.timesteps, "_share", lambda a, b: of(a.inner) == of(b.inner))
    fused = fd.integrations.diffusers.fuse(CONFIGS[name].make(), noise="philox", **options)
    counts = []
    with Gpu(2 * 3 * 12 * 16) as gpu:
        x = torch.linspace(-1, 1, 2 * 3 * 12 * 16).view(SHAPE).to("cuda")
        fused.set_timesteps(STEPS, device="cuda")
        if hasattr(fused, "set_begin_index"):
            fused.set_begin_index(0)
        for t in fused.timesteps:
            output = model(fused.scale_model_input(x, t) if hasattr(fused, "scale_model_input") else x, t)
            gpu.take()
            x = fused.step(output, t, x, return_dict=False)[0]
            counts.append(gpu.take())
    return counts


def test_timesteps_of_tokens_are_not_read(monkeypatch):
    monkeypatch.setattr(fd.integrations.timesteps, "_share", lambda a, b: of(a.inner) == of(b.inner))
    fused = fd.integrations.diffusers.fuse(CONFIGS["flow euler"].make())
    counts = []
    with Gpu(2 * 64 * 16) as gpu:
        x, tokens = fd.randn((2, 64, 16), seeds=4).to("cuda"), torch.linspace(10, 990, 128).view(2, 64).to("cuda")
        fused.set_timesteps(STEPS, device="cuda")
        fused.set_begin_index(0)
        for t in fused.timesteps:
            output = torch.tanh(x)
            gpu.take()
            x = fused.step(output, t, x, per_token_timesteps=tokens)[0]
            counts.append(gpu.take())
    assert [(c.reads, c.d2h, c.ops.get("fastdiff.step_")) for c in counts[1:]] == [(0, 0, 1)] * (STEPS - 1)
