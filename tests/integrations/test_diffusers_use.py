"""Fused schedulers as people treat them: buffers used again, odd layouts, threads, copies in mid-run, NaN, autocast."""

import copy
import inspect
import io
import pickle
import random
import sys
import threading

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from fastdiff.integrations import probing
from integrations.schedulers import CONFIGS, SD, made, model, relative

fuse = fd.integrations.diffusers.fuse
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Should have t")
OTHERWISE = {"CogVideoXDPMScheduler", "DDPMWuerstchenScheduler", "ScoreSdeVeScheduler", "SCMScheduler"}  # their step takes more
SLOW = {"lms", "kdpm2", "kdpm2 ancestral", "dpm++ sde", "cosine dpm"}
NAMES = [name for name, c in CONFIGS.items() if c.fused and c.name not in OTHERWISE and name not in SLOW]
SHAPE = (2, 3, 6, 6)


def run(scheduler, name, steps=8, before=None, after=None, between=None, shape=SHAPE):
    """The last latents. before: makes (output, sample) of them; after: makes the latents of (output, sample, what step returned);
    between: makes the scheduler of (scheduler, step)."""
    scheduler.set_timesteps(steps, **CONFIGS[name].steps)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) * min(float(getattr(scheduler, "init_noise_sigma", 1.0)), 80.0)
    for i, t in enumerate(scheduler.timesteps):
        scheduler = scheduler if between is None else between(scheduler, i)
        output = model(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t)
        if before is not None:
            output, x = before(output, x)
        options = {**CONFIGS[name].step, "return_dict": False}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = generator
        result = scheduler.step(output, t, x, **options)
        x = result[0] if after is None else after(output, x, result)
    return x


def both(name, **hooks):
    return run(made(name), name, **hooks), run(fuse(made(name)), name, **hooks)


# ---- tensors


def returned_overwritten(output, x, result):
    kept = result[0].clone()
    for t in result:
        if isinstance(t, torch.Tensor):
            t.fill_(1e6)
    return kept


def output_overwritten(output, x, result):
    output.fill_(1e6)
    return result[0]


def sample_overwritten(output, x, result):
    x.fill_(1e6)
    return result[0]


@pytest.mark.parametrize("after", [returned_overwritten, output_overwritten, sample_overwritten], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_buffers_that_are_used_again(name, after, no_own_step):
    """As by CUDA graphs and in-place callbacks. What a scheduler itself keeps without a copy is changed in both."""
    if name == "flow heun" and after is sample_overwritten:
        pytest.skip("the scheduler itself keeps the sample without a copy, the fused one has what it needs of it")
    own, fused = both(name, after=after)
    assert relative(fused, own) < 1e-4


LAYOUTS = {
    "transposed": lambda v: v.transpose(2, 3).contiguous().transpose(2, 3),
    "every other": lambda v: torch.stack([v, v], -1)[..., 0],
    "channels last": lambda v: v.to(memory_format=torch.channels_last),
    "batch last": lambda v: v.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "at an odd address": lambda v: torch.cat([torch.zeros(1), v.reshape(-1)])[1:].view(v.shape),
    "one sample expanded": lambda v: v[:1].expand(v.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["ddpm", "ddim clip", "euler ancestral", "dpm++ 3m sde", "unipc bh2", "heun", "pndm", "flow euler"]
)
def test_layouts_of_latents_and_outputs(name, layout, no_own_step):
    change = LAYOUTS[layout]
    for before in (
        lambda output, x: (change(output), change(x)),
        lambda output, x: (change(output), x.contiguous()),
        lambda output, x: (output.contiguous(), change(x)),
    ):
        own, fused = both(name, before=before)
        assert relative(fused, own) < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_stays_where_it_is(name, value):
    """In the sample where it came in, and nowhere else."""

    def before(output, x):
        output = output.clone()
        output[0, 1] = value
        return output, x

    own, fused = both(name, before=before, steps=5)
    assert torch.equal(torch.isfinite(own), torch.isfinite(fused)) and torch.isfinite(fused[1]).all()
    assert relative(fused[1], own[1]) < 1e-4


@pytest.mark.parametrize("shape", [(0, 3, 6, 6), (2, 3, 0, 6)], ids=str)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "dpm++ 2m sde", "unipc bh2", "flow euler"])
def test_nothing_to_sample(name, shape):
    own, fused = both(name, shape=shape)
    assert fused.shape == own.shape == shape and fused.dtype == own.dtype


@pytest.mark.parametrize("name", [name for name in NAMES if name != "unipc 3"])  # its own einsum rounds to bfloat16 there
def test_autocast_changes_nothing(name, no_own_step):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, fused = both(name)
    assert relative(fused, own) < 1e-4


def in_threads(work):
    """work(seed) in eight threads at once."""
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- timesteps


@pytest.mark.parametrize("kind", ["int", "numpy", "float", "one element", "float32", "int32"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "dpm++ 2m", "flow euler", "lcm"])
def test_timesteps_of_any_kind(name, kind):
    results = []
    for scheduler in (made(name), fuse(made(name))):
        scheduler.set_timesteps(5)
        t = scheduler.timesteps[0]
        t = {"int": int(t), "numpy": np.int64(int(t)), "float": float(t), "one element": t[None], "float32": t.float(),
             "int32": t.int()}[kind]  # fmt: skip
        x = torch.linspace(-1, 1, 216).view(SHAPE)
        takes = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": torch.Generator().manual_seed(0)} if takes else {}
        try:
            results.append(scheduler.step(x / 2, t, x, **options)[0])
        except (IndexError, ValueError) as error:
            results.append(str(error))
    own, fused = results
    assert own == fused if isinstance(own, str) else relative(fused, own) < 1e-4


# ---- threads, and copies in mid-run


@pytest.fixture
def often_switched():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_many_threads(often_switched):
    """Each with schedulers of its own; what was found of a configuration is shared among them."""
    names = ["ddpm", "dpm++ 2m sde", "unipc bh2", "euler ancestral", "heun", "pndm plms", "ddim eta", "flow euler"]
    cases = [(name, noise, steps) for name in names for noise in fd.integrations.diffusers.NOISES for steps in (3, 5)]
    expected = {case: run(fuse(made(case[0]), case[1]), case[0], steps=case[2]) for case in cases}
    probing._roots.clear()
    wrong = []

    def work(seed):
        for case in random.Random(seed).sample(cases, 8):
            try:
                got = run(fuse(made(case[0]), case[1]), case[0], steps=case[2])
                if not torch.equal(got, expected[case]):
                    wrong.append(case)
            except Exception as error:  # noqa: BLE001  the thread would lose it
                wrong.append((case, error))

    in_threads(work)
    assert not wrong


def test_more_configurations_than_are_remembered(often_switched):
    wrong = []

    def work(seed):
        for i in range(12):
            scheduler = diffusers.DDIMScheduler(**{**SD, "beta_end": 0.01 + 1e-4 * (12 * seed + i)}, clip_sample=False)
            try:
                if relative(run(fuse(scheduler), "ddim", steps=3), run(scheduler, "ddim", steps=3)) > 1e-4:
                    wrong.append((seed, i))
            except Exception as error:  # noqa: BLE001  the thread would lose it
                wrong.append((seed, i, error))

    in_threads(work)
    assert not wrong


def saved_and_loaded(scheduler):
    buffer = io.BytesIO()
    torch.save(scheduler, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIES = {
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "torch.save": saved_and_loaded,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("noise", fd.integrations.diffusers.NOISES)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["ddpm", "dpm++ 2m sde", "unipc bh2", "heun", "pndm plms"])
def test_a_copy_goes_on_where_the_run_stands(name, how, noise, no_own_step):
    expected = run(fuse(made(name), noise), name)
    got = run(fuse(made(name), noise), name, between=lambda s, i: COPIES[how](s) if i in (0, 3, 5) else s)
    assert float((got - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["dpm++ 2m", "unipc bh2", "ddim"])
def test_inference_mode_and_gradients_by_turns(name, no_own_step):
    fused, own = fuse(made(name)), made(name)
    for scheduler in (fused, own):
        with torch.inference_mode():
            run(scheduler, name)
    starts, results = [], []
    for scheduler in (fused, own):
        scheduler.set_timesteps(4)
        x = torch.linspace(-1, 1, 216).view(SHAPE).requires_grad_()
        starts.append(x)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x)[0]
        results.append(torch.autograd.grad(x.square().sum(), starts[-1])[0])
    assert relative(results[0], results[1]) < 1e-3


def test_a_subclass_that_changes_what_step_returns(no_own_step):
    class Half(diffusers.EulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            result = super().step(model_output, timestep, sample, return_dict=return_dict)
            result[0].mul_(0.5)
            return result

    own, fused = run(Half(**SD), "euler"), run(fuse(Half(**SD)), "euler")
    assert relative(fused, own) < 1e-4
