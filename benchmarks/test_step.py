"""The step beside diffusers', torch.compile's and torch.randn's, as shipped: what a user's loop would call.

The model is a tensor that is already there, so that what is timed is the sampler alone.
"""

import pytest
import torch

import fastdiff as fd
from benchmarks.timing import interleaved

SHAPES = [(4, 4, 64, 64), (64, 3, 32, 32), (256, 3, 32, 32), (16, 3, 256, 256)]
STEPS = 20


def our_loop(sampler, shape, out, **options):
    plan = fd.plan(sampler, schedule="linear", prediction="epsilon", steps=STEPS, **options)
    run = fd.Stepper(plan, shape, seeds=0)
    first = run.row

    def loop():
        run.row = first
        while not run.done:
            run.step(out)

    return loop


def diffusers_loop(name, shape, out, **config):
    schedulers = pytest.importorskip("diffusers.schedulers", reason="diffusers is not installed")
    scheduler = getattr(schedulers, name)(beta_schedule="linear", **config)
    generator = torch.Generator().manual_seed(0)
    extra = {} if name == "DDIMScheduler" else {"generator": generator}
    start = torch.randn(shape)

    def loop():
        scheduler.set_timesteps(STEPS)
        x = start
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(out, t, x, return_dict=False, **extra)[0]

    return loop


NOISY = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampler", NOISY)
def test_noisy_step_beside_diffusers(benchmark, ratio, sampler, shape):
    name, config, options = NOISY[sampler]
    out = torch.randn(shape)
    ours, theirs = our_loop(sampler, shape, out, **options), diffusers_loop(name, shape, out, **config)
    times = interleaved({"ours": ours, "theirs": theirs})
    per_step = {k: tuple(t / STEPS for t in v) for k, v in times.items()}
    ratio(f"{sampler}: step with noise, beside diffusers", shape, per_step["ours"][0], per_step["theirs"][0], 10, per_step)
    benchmark.pedantic(ours, rounds=5)


def op_step(shape, noise):
    """One row y = a x + b e [+ s N] as ``step_`` is called, in place."""
    x, out = torch.randn(shape), torch.randn(shape)
    layout = fd.reference.Layout(2, 1, 0, int(noise))
    coef = torch.zeros(1, layout.width)
    coef[0, layout.y(0) : layout.y(0) + 2] = torch.tensor([0.9, 0.1])
    keys = None
    if noise:
        coef[0, layout.y(0) + 3] = 0.3
        keys = torch.ops.fastdiff.run_keys(torch.arange(shape[0]), torch.tensor([[1]]), torch.tensor([[0]]))
    args = ([x, out], [x], None, coef, torch.tensor([[-1, 0, -1, -1]], dtype=torch.int32), None, 0, keys, *[None] * 8)
    op = torch.ops.fastdiff.step_.default
    return lambda: op(*args)


def compiled_step(shape, noise):
    x, out = torch.randn(shape), torch.randn(shape)

    def update(x, out):
        y = 0.9 * x + 0.1 * out
        return x.copy_(y + 0.3 * torch.randn_like(x)) if noise else x.copy_(y)

    torch._dynamo.reset()
    compiled = torch.compile(update, dynamic=False)
    return lambda: compiled(x, out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_noisy_step_beside_compile_and_randn(benchmark, ratio, shape):
    functions = {"ours": op_step(shape, True), "compiled": compiled_step(shape, True), "randn": lambda: torch.randn(shape)}
    times = interleaved(functions)
    ratio("a x + b e + s N, beside torch.compile", shape, times["ours"][0], times["compiled"][0], 20, times)
    ratio("a x + b e + s N, beside torch.randn alone", shape, times["ours"][0], times["randn"][0], 4, times)
    benchmark.pedantic(functions["ours"], rounds=50)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), *SHAPES], ids=str)
@torch.no_grad()
def test_deterministic_step_beside_compile(benchmark, ratio, shape):
    functions = {"ours": op_step(shape, False), "compiled": compiled_step(shape, False)}
    times = interleaved(functions)
    target = 3 if torch.Size(shape).numel() <= 16384 else 1
    ratio("a x + b e, beside torch.compile", shape, times["ours"][0], times["compiled"][0], target, times)
    benchmark.pedantic(functions["ours"], rounds=50)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_ddim_step_beside_diffusers(benchmark, ratio, shape):
    out = torch.randn(shape)
    ours, theirs = our_loop("ddim", shape, out), diffusers_loop("DDIMScheduler", shape, out, clip_sample=False)
    times = interleaved({"ours": ours, "theirs": theirs})
    per_step = {k: tuple(t / STEPS for t in v) for k, v in times.items()}
    ratio("ddim: deterministic step, beside diffusers", shape, per_step["ours"][0], per_step["theirs"][0], 1, per_step)
    benchmark.pedantic(ours, rounds=5)


@torch.no_grad()
def test_fixed_cost(benchmark, ratio):
    """A step of four elements from Python, beside 10 microseconds."""
    shape = (1, 1, 2, 2)
    loop = our_loop("ddpm", shape, torch.randn(shape))
    bare = op_step(shape, True)
    times = interleaved({"stepper": loop, "op": lambda: [bare() for _ in range(STEPS)]}, seconds=1)
    per_call = {k: tuple(t / STEPS for t in v) for k, v in times.items()}
    ratio("fixed cost of Stepper.step, beside 10 us", shape, per_call["stepper"][0], 10e-6, 1, per_call)
    ratio("fixed cost of the op, beside 6 us", shape, per_call["op"][0], 6e-6, 1, per_call)
    benchmark.pedantic(bare, rounds=1000)
