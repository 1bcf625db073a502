"""On emulated CUDA tensors: a fused step is one launch, and waits for nothing."""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from counter.emulated import Counts, Gpu
from integrations.schedulers import CONFIGS, model

SHAPE = (2, 3, 12, 16)
STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NAMES = [
    "ddpm",
    "ddpm clip",
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
    monkeypatch.setattr(fd.integrations.diffusers, "_share", lambda a, b: of(a.inner) == of(b.inner))
    fused = fd.integrations.diffusers.fuse(CONFIGS[name].make(), noise="philox")
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
    monkeypatch.setattr(fd.integrations.diffusers, "_share", lambda a, b: of(a.inner) == of(b.inner))
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
