"""Timesteps of each sample or token: the schedulers' own numbers in one call of the op."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from fastdiff.steering import LatentVector
from integrations.schedulers import made, relative

fuse = fd.integrations.diffusers.fuse
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SHAPE = (2, 10, 6)
FLOWS = {"plain": {}, "shifted": {"shift": 3.0}, "stochastic": {"stochastic_sampling": True}}


def flow(name="plain"):
    return diffusers.FlowMatchEulerDiscreteScheduler(**FLOWS[name])


def run(scheduler, shape=SHAPE, dtype=torch.float32, seed=1, model=torch.tanh, steps=8, x=None):
    """As LTX's pipeline does it: tokens of a given image are less noisy than the others."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = fd.randn(shape, seeds=4).to(dtype) if x is None else x
    given = torch.linspace(0, 1, shape[0] * shape[1]).view(shape[:2])
    for t in scheduler.timesteps:
        tokens = torch.minimum(t, (1 - given) * 1000)
        x = scheduler.step(model(x), t, x, generator=generator, per_token_timesteps=tokens, return_dict=False)[0]
    assert scheduler.step_index == steps
    return x


@pytest.mark.parametrize("shape", [SHAPE, (4, 4, 4), (1, 7, 128), (3, 2, 5)], ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_tokens(name, shape, no_own_step):
    expected, got = run(flow(name), shape), run(fuse(flow(name)), shape)
    assert relative(got, expected) < 1e-6
    assert relative(fd.randn(shape, seeds=4), expected) > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tokens_in_half_precision(dtype, no_own_step):
    """The scheduler returns float32 here; its output is kept in half precision for the next step, as pipelines do."""
    for scheduler, results in ((flow(), expected := []), (fuse(flow()), got := [])):
        scheduler.set_timesteps(4)
        x = fd.randn(SHAPE, seeds=4).to(dtype)
        tokens = torch.linspace(10, 990, 20).view(2, 10)
        for t in scheduler.timesteps:
            y = scheduler.step(torch.tanh(x), t, x, per_token_timesteps=tokens)[0]
            results.append(y)
            x = y.to(dtype)
    for a, b in zip(expected, got):
        assert a.dtype == b.dtype == torch.float32 and relative(b, a) < (1e-2 if dtype == torch.bfloat16 else 2e-3)
    assert relative(got[0], expected[0]) < 1e-6


def test_tokens_between_steps_of_one_timestep(no_own_step):
    results = []
    for scheduler in (flow(), fuse(flow())):
        scheduler.set_timesteps(6)
        x = fd.randn(SHAPE, seeds=4)
        tokens = torch.linspace(10, 990, 20).view(2, 10)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.tanh(x), t, x, per_token_timesteps=tokens if i % 2 else None)[0]
        results.append(x)
    assert relative(results[1], results[0]) < 1e-6


def test_philox_noise_of_tokens_is_the_samples_own(no_own_step):
    fused, x = fuse(flow("stochastic"), "philox"), fd.randn(SHAPE, seeds=4)

    def last(which):
        fused.set_timesteps(4)
        y, tokens = x[which], torch.linspace(10, 990, 20).view(2, 10)[which]
        generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
        for t in fused.timesteps:
            y = fused.step(torch.tanh(y), t, y, generator=[generators[i] for i in which], per_token_timesteps=tokens)[0]
        return y

    whole = last([0, 1])
    assert torch.equal(torch.cat([last([0]), last([1])]), whole) and torch.isfinite(whole).all()
    assert relative(run(fused), run(fuse(flow("stochastic")))) > 0.1  # other noise
    draws = fused.step(torch.zeros(1, 4096, 8), fused.timesteps[0], torch.zeros(1, 4096, 8),
                       per_token_timesteps=torch.full((1, 4096), 500.0))[0] if not fused.set_timesteps(4) else None  # fmt: skip
    sigma = float(max(s for s in fused.sigmas.tolist() if s < 0.5))
    assert abs(float(draws.std()) / sigma - 1) < 0.02 and abs(float(draws.mean())) < 0.02


def test_gradients_of_tokens(no_own_step):
    results = []
    for scheduler in (flow(), fuse(flow())):
        start = fd.randn(SHAPE, seeds=4).requires_grad_()
        results.append(torch.autograd.grad(run(scheduler, x=start, steps=3).square().sum(), start)[0])
    assert relative(results[1], results[0]) < 1e-5


def test_timesteps_of_each_sample(no_own_step):
    """Wuerstchen takes them."""
    results = []
    for scheduler in (made("wuerstchen"), fuse(made("wuerstchen"))):
        scheduler.set_timesteps(8)
        generator, x = torch.Generator().manual_seed(1), fd.randn((3, 2, 4, 4), seeds=3)
        for t in scheduler.timesteps[:-1]:
            x = scheduler.step(torch.tanh(x), torch.tensor([1.0, 1.0, 0.95]) * t, x, generator=generator, return_dict=False)[0]
        results.append(x)
    assert relative(results[1], results[0]) < 2e-6


def test_schedulers_that_take_one_timestep_say_so_themselves():
    x = fd.randn((5, 3, 4, 4), seeds=3)
    for scheduler in (fuse(made("ddim")), made("ddim")):
        scheduler.set_timesteps(5)
        with pytest.raises(RuntimeError, match="ambiguous"):
            scheduler.step(x, torch.tensor([800, 600, 400, 200, 0]), x)


def test_steering_is_refused():
    fused = fuse(flow(), steering=[LatentVector(torch.ones(1, *SHAPE[1:])).at(1.0)])
    with pytest.raises(ValueError, match="steering acts at one noise level a step"):
        run(fused)
