"""In half precision, a fused run is as near to the scheduler's own run in float64 as the scheduler itself, or nearer.

The network is the exact denoiser of two Gaussians, rounded to the latent's dtype as a network's output is; 64 samples, 20 steps.
What is compared is the mean error over all elements, against the original in float64 with the same noise. Two runs that differ in
nothing but where they round differ by some 2 % in it.
"""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from integrations import schedulers
from integrations.mixtures import network, shared_noise
from integrations.schedulers import CONFIGS, made, sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SHAPE = (64, 4, 8, 8)
LINEAR = [name for name in CONFIGS if CONFIGS[name].fused]


def errors(name, dtype, monkeypatch, steps=20):
    """(the scheduler's own, the fused one's) mean error."""
    config, kept = CONFIGS[name], {}

    def run(scheduler, dtype, kept, replay=False):
        monkeypatch.setattr(schedulers, "model", network(scheduler) or schedulers.model)
        scheduler.set_timesteps(steps, **config.steps)
        sigma = min(float(getattr(scheduler, "init_noise_sigma", 1.0)), 2000.0)  # some would overflow float16
        start = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * sigma).to(kept.setdefault("dtype", dtype))
        torch.manual_seed(0)
        with shared_noise(monkeypatch, kept, replay):
            generator = torch.Generator().manual_seed(2)
            return sample(scheduler, config, steps=steps, generator=generator, x=start.to(dtype))

    own = run(made(name), dtype, kept)
    exact = run(made(name), torch.float64, kept, replay=True)
    fused = run(fd.integrations.diffusers.fuse(made(name)), dtype, {})
    assert own.dtype == fused.dtype and torch.isfinite(exact).all() and exact.abs().mean() < 3
    return tuple(float((x.double() - exact).abs().mean()) for x in (own, fused))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", LINEAR)
def test_the_mean_error_is_not_larger(name, dtype, monkeypatch, no_own_step):
    own, fused = errors(name, dtype, monkeypatch)
    assert fused <= 1.05 * own, f"{fused:.3e}, the scheduler's own is {own:.3e}: {fused / own:.3f}"
    if CONFIGS[name].name in ("DDPMScheduler", "DDIMScheduler"):
        assert fused < own, f"{fused:.3e}, the scheduler's own is {own:.3e}: {fused / own:.3f}"
