"""Fused schedulers of diffusers: dtypes, layouts, gradients, and the op's own noise."""

import inspect
from collections import OrderedDict

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from integrations.schedulers import CONFIGS, made, relative, sample

fuse = fd.integrations.diffusers.fuse
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Should have t")


# ---- dtypes and gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["ddpm", "ddim eta", "euler", "euler ancestral", "dpm++ 2m", "dpm++ 2m sde", "unipc bh2", "flow euler", "pndm plms"]
)
def test_half_precision_has_the_schedulers_dtypes_and_is_as_near(name, dtype, no_own_step):
    """As near to the run in float32, by the mean error over all elements."""
    config, shape = CONFIGS[name], (8, 4, 16, 16)
    exact = sample(made(name), config, shape=shape, dtype=torch.float32)
    theirs, ours = [], []
    errors = [
        float((sample(s, config, shape=shape, dtype=dtype, outputs=kept).double() - exact.double()).abs().mean())
        for s, kept in ((made(name), theirs), (fuse(made(name)), ours))
    ]
    assert [[t.dtype for t in r] for r in ours] == [[t.dtype for t in r] for r in theirs]
    assert errors[1] <= 1.1 * errors[0] + 1e-7


def test_mixed_dtypes_of_latent_and_output(no_own_step):
    for latent, output in ((torch.float32, torch.float16), (torch.bfloat16, torch.float32)):
        for name in ("ddim", "euler", "dpm++ 2m", "flow euler"):
            results = []
            for s in (made(name), fuse(made(name))):
                s.set_timesteps(5)
                x = torch.linspace(-1, 1, 108).view(1, 3, 6, 6).to(latent)
                if hasattr(s, "scale_model_input"):
                    s.scale_model_input(x, s.timesteps[0])
                results.append(s.step(x.to(output), s.timesteps[0], x, return_dict=False)[0])
            assert results[0].dtype == results[1].dtype
            torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["ddim clip", "dpm++ 2m", "euler ancestral"])
def test_gradients_reach_through_a_run(name, no_own_step):
    """For those who train or guide through the sampler."""
    results = []
    for s in (made(name), fuse(made(name))):
        s.set_timesteps(4)
        x = start = (torch.linspace(-1, 1, 108).view(1, 3, 6, 6) * s.init_noise_sigma).requires_grad_()
        options = {"generator": torch.Generator().manual_seed(0)} if "generator" in inspect.signature(s.step).parameters else {}
        for t in s.timesteps:
            x = s.step(torch.tanh(s.scale_model_input(x, t)), t, x, **options)[0]
        results.append(torch.autograd.grad(x.square().sum(), start)[0])
    assert relative(results[1], results[0]) < 1e-3


def test_layouts(no_own_step):
    s, t = fuse(made("ddim")), made("ddim")
    x = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    for value in (
        x.to(memory_format=torch.channels_last),
        x.expand(2, 8, 4, 6)[:, :4],
        x[:1].expand(2, 8, 4, 6),
        x.transpose(2, 3),
    ):
        for scheduler in (s, t):
            scheduler.set_timesteps(4)
        a, b = (scheduler.step(value * 0.5, scheduler.timesteps[0], value)[0] for scheduler in (s, t))
        assert relative(a, b) < 1e-6


# ---- noise of the op itself


@pytest.mark.parametrize(
    "name", [n for n in ("ddpm", "ddim eta", "euler ancestral", "dpm++ 3m sde", "sa solver", "lcm", "dpm++ sde", "cosine dpm")]
)
def test_philox_noise_depends_on_the_samples_own_generator(name, no_own_step):
    config, fused = CONFIGS[name], fuse(made(name), noise="philox")
    start = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * min(float(fused.init_noise_sigma), 80.0)

    def run(which):
        return sample(
            fused,
            config,
            x=start[which],
            generator=[torch.Generator().manual_seed(s) for s in torch.arange(10, 14)[which].tolist()],
        )

    takes = "generator" in inspect.signature(fused.step).parameters
    if not takes:
        torch.manual_seed(5)
    whole = run(slice(None))
    assert torch.isfinite(whole).all() and (whole.std() > 0)
    if not takes:
        torch.manual_seed(5)
        assert torch.equal(whole, run(slice(None)))
        assert not torch.equal(whole, run(slice(None)))
        return
    assert torch.equal(run(slice(None)), whole)
    assert torch.equal(run([2, 0]), whole[[2, 0]])
    assert torch.equal(torch.cat([run([i]) for i in range(4)]), whole)
    generator = torch.Generator().manual_seed(3)
    first = sample(fused, config, x=start, generator=generator)
    assert not torch.equal(first, sample(fused, config, x=start, generator=generator))  # it has moved on
    assert torch.equal(first, sample(fused, config, x=start, generator=generator.manual_seed(3)))


@pytest.mark.parametrize("name", ["ddpm", "euler ancestral", "dpm++ 2m sde", "sa solver", "dpm++ sde"])
def test_philox_noise_has_the_law_of_the_schedulers(name, no_own_step):
    """Mean and variance of the last latents of a linear model, over many elements."""

    def last(scheduler, seed):
        torch.manual_seed(seed)
        scheduler.set_timesteps(12)
        x = torch.zeros(1, 4, 64, 64)
        options = (
            {"generator": torch.Generator().manual_seed(seed)}
            if "generator" in inspect.signature(scheduler.step).parameters
            else {}
        )
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * scheduler.scale_model_input(x, t), t, x, **options)[0]
        return x

    theirs, ours = last(made(name), 4), last(fuse(made(name), noise="philox"), 4)
    count = theirs.numel()
    assert abs(float(ours.mean() - theirs.mean())) < 6 * float(theirs.std()) * (2 / count) ** 0.5
    assert abs(float(ours.std() / theirs.std()) - 1) < 6 * (1 / count) ** 0.5


# ---- one Brownian path


def along(name, steps, monkeypatch):
    """(interval, {draw: weight}) of every increment of a run."""
    rows, own = [], fd.integrations.diffusers.along_path

    def watched(ahead):
        own(ahead)
        rows.extend(ahead)

    with monkeypatch.context() as patch:
        patch.setattr(fd.integrations.diffusers, "along_path", watched)
        patch.setattr("fastdiff.integrations.probing._roots", OrderedDict())
        sample(fuse(made(name), "philox"), CONFIGS[name], steps=steps)
    found = []
    for row in rows:
        if row.along is not None:
            (draw,), (weights,) = row.draws, row.along.weights
            numbers = row.along.draws[row.along.row].tolist()
            found.append((sorted(map(float, draw.between)), {n: w for n, w in zip(numbers, weights) if w}))
    return found


def covariance(one, other):
    """Of two increments, by their normals, and as of a Brownian motion."""
    (a, b), weights = one
    (c, d), others = other
    shared = max(0.0, min(b, d) - max(a, c))
    return sum(w * others.get(n, 0.0) for n, w in weights.items()), shared / ((b - a) * (d - c)) ** 0.5


@pytest.mark.parametrize("name", ["dpm++ sde", "cosine dpm"])
def test_increments_are_those_of_one_path(name, monkeypatch):
    """Exactly within a run; nearly between runs of other numbers of steps, which look at the path less closely."""
    runs = [along(name, steps, monkeypatch) for steps in (15, 40)]
    for found in runs:
        assert len(found) > 10
        for one in found:
            for other in found:
                got, expected = covariance(one, other)
                assert abs(got - expected) < 2e-3, (one[0], other[0])
    pairs = [covariance(one, other) for one in runs[0] for other in runs[1]]
    assert max(expected for _, expected in pairs) > 0.5
    assert sum(abs(got - expected) for got, expected in pairs) / sum(expected for _, expected in pairs) < 0.1


@pytest.mark.parametrize("name", ["dpm++ sde", "cosine dpm"])
def test_more_steps_follow_the_same_path(name, no_own_step):
    start = torch.ones(2, 3, 6, 6) * (14 if name == "dpm++ sde" else 80)

    def last(steps, seed=3):
        torch.manual_seed(seed)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
        return sample(fuse(made(name), "philox"), CONFIGS[name], steps=steps, x=start, generator=generators)

    fine = last(80)
    assert relative(last(40), fine) < 0.5 * relative(last(80, seed=11), fine)
    assert relative(last(20), fine) < 0.5 * relative(last(80, seed=11), fine)
