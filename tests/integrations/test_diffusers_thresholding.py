"""Dynamic thresholding inside of the fused step: the same numbers as the schedulers' own."""

import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from fastdiff.steering import LatentVector
from integrations.schedulers import SD, Config, relative, sample

fuse = fd.integrations.diffusers.fuse
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
RATIO = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.5}
KINDS = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddpm v": ("DDPMScheduler", {"clip_sample": True, "prediction_type": "v_prediction"}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddim sample": ("DDIMScheduler", {"prediction_type": "sample"}),
    "ddim parallel": ("DDIMParallelScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++ single": ("DPMSolverSinglestepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "sa solver": ("SASolverScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


def config(name):
    kind, options = KINDS[name]
    return Config(kind, {**SD, **RATIO, **options})


def start(batch=3):
    """Samples of different sizes: each has a threshold of its own."""
    return fd.randn((batch, 3, 6, 6), seeds=8) * torch.tensor([0.2, 1.0, 4.0]).view(3, 1, 1, 1)[:batch]


@pytest.mark.parametrize("name", KINDS)
def test_the_schedulers_own_numbers(name, no_own_step):
    c = config(name)
    expected = sample(c.make(), c, x=start())
    got = sample(fuse(c.make()), c, x=start())
    assert relative(got, expected) < 1e-4
    plain = Config(c.name, {**c.config, "thresholding": False, "clip_sample": False} if "clip_sample" in c.config else
                   {**c.config, "thresholding": False})  # fmt: skip
    assert relative(sample(plain.make(), plain, x=start()), expected) > 1e-3


def test_each_sample_has_its_own_threshold(no_own_step):
    c = config("ddim")
    fused = fuse(c.make())
    fused.set_timesteps(5)
    x = start()
    t = fused.timesteps[3]
    d = fused.step(x / 2, t, x).pred_original_sample
    alpha = float(fused.alphas_cumprod[t])
    whole = (x - (1 - alpha) ** 0.5 * x / 2) / alpha**0.5
    s = torch.quantile(whole.abs().flatten(1), 0.9, dim=1).clamp(1, 2.5).view(3, 1, 1, 1)
    assert s.flatten().tolist()[0] == 1 and s.flatten().tolist()[2] == 2.5 and 1 < s.flatten().tolist()[1] < 2.5
    torch.testing.assert_close(d, whole.clamp(-s, s) / s, rtol=1e-5, atol=1e-6)
    alone = fused.step(x[1:2] / 2, t, x[1:2]).pred_original_sample
    assert torch.equal(alone, d[1:2])


@pytest.mark.parametrize("noise", fd.integrations.diffusers.NOISES)
def test_with_steering_the_quantile_is_of_the_steered_estimate(noise, no_own_step):
    c, x = config("ddim"), start()
    vector = LatentVector(fd.randn((1, 3, 6, 6), seeds=2) * 2)
    fused, parent = fuse(c.make(), noise, [vector.at(1.0)]), c.make()
    for scheduler in (fused, parent):
        scheduler.set_timesteps(6)
    y = x
    for t in parent.timesteps:
        level = ((1 - parent.alphas_cumprod[t]) / parent.alphas_cumprod[t]) ** 0.5
        x, y = fused.step(x / 3, t, x)[0], parent.step(y / 3 - vector.vectors / level, t, y)[0]
        assert relative(x, y) < 1e-4
    zero = sample(fuse(c.make(), noise, [vector.at(0.0)]), c, x=start())
    assert torch.equal(zero, sample(fuse(c.make(), noise), c, x=start()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_near(dtype, no_own_step):
    c, x = config("dpm++ 2m"), fd.randn((16, 3, 16, 16), seeds=8)
    exact = sample(c.make(), c, x=x)
    theirs, ours = (sample(s, c, x=x.to(dtype), dtype=dtype) for s in (c.make(), fuse(c.make())))
    assert ours.dtype == theirs.dtype
    assert float((ours - exact).abs().mean()) <= 1.1 * float((theirs - exact).abs().mean())


def test_gradients_are_the_schedulers_own():
    results = []
    for scheduler in (config("ddim").make(), fuse(config("ddim").make())):
        scheduler.set_timesteps(3)
        x = begin = start().requires_grad_()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not fused where gradients are asked for.*")
            for t in scheduler.timesteps:
                x = scheduler.step(torch.tanh(x), t, x)[0]
        results.append(torch.autograd.grad(x.square().sum(), begin)[0])
    assert torch.equal(*results)


def test_another_thresholding_is_the_schedulers_own():
    class Halved(diffusers.DDIMScheduler):
        def _threshold_sample(self, sample):
            return super()._threshold_sample(sample) / 2

    c = config("ddim")
    with pytest.warns(UserWarning, match="its dynamic thresholding is another one"):
        got = sample(fuse(Halved(**c.config)), c, x=start())
    assert torch.equal(got, sample(Halved(**c.config), c, x=start()))
