"""What is changed behind a fused scheduler's back, or around it: tables and history in place, autocast, torch.compile, torch.func."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from fastdiff.integrations import probing
from integrations.schedulers import CONFIGS, SD, made, model, relative, sample
from integrations.test_diffusers_use import NAMES, SHAPE, run

fuse = fd.integrations.diffusers.fuse
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Should have t")


def scaled_in_place(table):
    def change(scheduler):
        value = getattr(scheduler, table, None)
        if isinstance(value, torch.Tensor):
            value.mul_(0.98)

    return change


def history_replaced(scheduler):
    for name in ("model_outputs", "ets", "derivatives"):
        history = getattr(scheduler, name, None)
        if history and history[-1] is not None:
            history[-1] = history[-1] * 0.5


CHANGES = {"alphas_cumprod": scaled_in_place("alphas_cumprod"), "sigmas": scaled_in_place("sigmas"), "history": history_replaced}


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_changed_in_place_counts(name, what, step, no_own_step):
    def between(scheduler, i):
        if i == step:
            CHANGES[what](scheduler)
        return scheduler

    own, fused = run(made(name), name, between=between), run(fuse(made(name)), name, between=between)
    assert relative(fused, own) < 1e-4


def test_a_last_level_that_is_not_zero(no_own_step):
    """As the pipelines of Cosmos 2 set it, between set_timesteps and the first step."""
    results = []
    for scheduler in (made("flow euler"), fuse(made("flow euler"))):
        scheduler.set_timesteps(4)
        scheduler.sigmas[-1] = scheduler.sigmas[-2]
        x = torch.linspace(-1, 1, 216).view(SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x)[0]
        results.append(x)
    assert relative(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("name", ["unipc 3", "dpm++ 2m", "sa solver"])
def test_rows_that_are_found_under_autocast(name, no_own_step):
    probing._roots.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sample(fuse(made(name)), CONFIGS[name])
    probing._roots.clear()
    assert torch.equal(inside, sample(fuse(made(name)), CONFIGS[name]))


@pytest.mark.parametrize("noise", fd.integrations.diffusers.NOISES)
@pytest.mark.parametrize("name", ["ddpm", "euler ancestral", "unipc bh2"])
def test_inside_of_a_compiled_function(name, noise, no_own_step):
    scheduler = fuse(made(name), noise)

    def one(x, t, options):
        return scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x, **options)[0]

    results = []
    for function in (torch.compile(one, backend="eager"), one):
        scheduler.set_timesteps(6)
        x = torch.linspace(-3, 3, 216).view(SHAPE)
        options = {} if name == "unipc bh2" else {"generator": torch.Generator().manual_seed(0)}
        for t in scheduler.timesteps:
            x = function(x, t, options)
        results.append(x)
    torch._dynamo.reset()
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:.*own step is used")
def test_functions_of_torch_func():
    results = []
    for scheduler in (made("ddim"), fuse(made("ddim"))):
        scheduler.set_timesteps(4)
        x, t = torch.linspace(-1, 1, 216).view(SHAPE), scheduler.timesteps[0]

        def step(x, scheduler=scheduler, t=t):
            return scheduler.step(torch.sin(x), t, x)[0]

        results.append((torch.func.jvp(step, (x,), (x,))[1], torch.func.vmap(step)(torch.stack([x, 2 * x]))))
    for own, fused in zip(*results):
        assert relative(fused, own) < 1e-5


def test_the_schedulers_own_step_goes_on_in_its_own_dtypes():
    """A run in half precision that a row cannot take any more: history comes back as the scheduler itself keeps it."""
    results = []
    for scheduler in (made("dpm++ 2m"), fuse(made("dpm++ 2m"))):
        scheduler.set_timesteps(6)
        x = torch.linspace(-1, 1, 216).view(SHAPE).half()
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(model(x, t).to_sparse().to_dense() if i != 3 else model(x, t)[:, :3], t, x)[0]
        results.append([x.dtype, *(h.dtype for h in scheduler.model_outputs)])
    assert results[0][0] == results[1][0]


def test_many_steps_of_a_scheduler_that_forgets_nothing(no_own_step):
    assert relative(sample(fuse(made("ipndm")), CONFIGS["ipndm"], steps=100), sample(made("ipndm"), CONFIGS["ipndm"], steps=100)) < 1e-4


@pytest.mark.parametrize("most", [0.5, 1.0, 3.0])
def test_thresholding_at_any_largest_value(most, no_own_step):
    results = [sample(f(diffusers.DDIMScheduler(**SD, thresholding=True, dynamic_thresholding_ratio=0.87, sample_max_value=most)),
                      CONFIGS["ddim"]) for f in (lambda s: s, fuse)]  # fmt: skip
    assert relative(results[1], results[0]) < 1e-4
