"""What diffusers asks of every scheduler, of the fused ones: configurations, shapes, spacings, noise added, determinism."""

import copy
import inspect
import itertools

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from integrations import schedulers
from integrations.mixtures import network
from integrations.schedulers import CONFIGS, FLOW_SIGMAS, SD, Config, made, model, relative, sample

fuse = fd.integrations.diffusers.fuse
NAMES = list(CONFIGS)
LINEAR = [name for name in NAMES if CONFIGS[name].fused]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def prepared(scheduler, config, steps=6):
    if config.name == "RePaintScheduler":
        scheduler.set_timesteps(steps, jump_length=2, jump_n_sample=2)
    else:
        scheduler.set_timesteps(steps, **config.steps)
    if config.name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(steps)
    return scheduler


# ---- configurations


@pytest.mark.parametrize("name", NAMES)
def test_configurations_go_through_files(name, tmp_path):
    """Saved by the fused scheduler, read by either class, with the same JSON each time."""
    parent = made(name)
    fused, cls = fuse(parent), type(parent)
    for scheduler in (parent, fused):
        prepared(scheduler, CONFIGS[name])  # what a run leaves behind is not saved
    fused.save_pretrained(tmp_path / "fused")
    parent.save_pretrained(tmp_path / "parent")
    text = (tmp_path / "parent/scheduler_config.json").read_text()
    assert (tmp_path / "fused/scheduler_config.json").read_text() == text
    for made_by in (cls.from_pretrained, type(fused).from_pretrained):
        again = made_by(tmp_path / "fused")
        assert again.to_json_string() == parent.to_json_string()
    assert type(cls.from_pretrained(tmp_path / "fused")) is cls
    assert cls.from_config(fused.config).to_json_string() == cls.from_config(parent.config).to_json_string()


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++ 2m", "flow euler", "lcm"])
def test_keys_that_a_scheduler_does_not_know(name):
    """They are handed back, or kept for another class, as the scheduler itself does."""
    parent = made(name)
    fused = fuse(parent)
    config = {**parent.config, "no_such_option": 3, "another": [1, 2]}
    results = [type(s).from_config(dict(config), return_unused_kwargs=True) for s in (parent, fused)]
    assert results[0][1] == results[1][1]
    assert {k: v for k, v in results[0][0].config.items()} == {k: v for k, v in results[1][0].config.items()}
    assert isinstance(results[1][0], type(parent)) and hasattr(results[1][0], "_fastdiff_noise")
    overridden = [type(s).from_config(s.config, num_train_timesteps=500) for s in (parent, fused)]
    assert overridden[0].config == overridden[1].config and len(overridden[1]) == 500
    assert relative(sample(overridden[1], CONFIGS[name], steps=6), sample(overridden[0], CONFIGS[name], steps=6)) < 1e-4


CHAIN = ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
         "DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
         "KDPM2DiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler"]  # fmt: skip


def test_one_configuration_through_many_classes(no_own_step):
    """`from_config` of another class's configuration, from fused to fused and from class to class."""
    start = {**SD, "steps_offset": 1, "timestep_spacing": "leading"}
    own, fused = diffusers.DDIMScheduler(**start), fuse(diffusers.DDIMScheduler(**start))
    for name in CHAIN:
        cls = getattr(diffusers, name)
        assert fused.compatibles == own.compatibles
        own, fused = cls.from_config(own.config), fuse(cls.from_config(fused.config))
        assert fused.to_json_string() == own.to_json_string()
        x = torch.linspace(-2, 2, 216).view(2, 3, 6, 6)
        assert relative(sample(fused, Config(name), steps=5, x=x), sample(own, Config(name), steps=5, x=x)) < 1e-4


# ---- what the options of a configuration do

SPACED = ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
          "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler",
          "DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"]  # fmt: skip
WITHOUT_SAMPLE = {"PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
                  "EulerAncestralDiscreteScheduler"}  # fmt: skip


SLOW_TO_MAKE = {"LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}


def alike(name, config, steps=5):
    """The run is the scheduler's own to 1e-4, or ten times nearer to the run in float64; that has to be one without noise."""
    cls = getattr(diffusers, name)
    own, fused = cls(**config), fuse(cls(**config))
    own.set_timesteps(steps)
    x = torch.linspace(-2, 2, 216).view(2, 3, 6, 6) * own.init_noise_sigma
    torch.manual_seed(0)
    expected = sample(own, Config(name), steps=steps, x=x)
    torch.manual_seed(0)
    got = sample(fused, Config(name), steps=steps, x=x)
    if relative(got, expected) < 1e-4:
        return
    exact = sample(cls(**config), Config(name), steps=steps, x=x.double())  # the scheduler itself may cancel in float32
    assert (got - exact).abs().max() < 0.1 * (expected - exact).abs().max(), config


@pytest.mark.parametrize("name", SPACED)
def test_predictions_and_spacings(name, no_own_step):
    predictions = ["epsilon", "v_prediction", *([] if name in WITHOUT_SAMPLE else ["sample"])]
    clip = {"clip_sample": False} if name in ("DDPMScheduler", "DDIMScheduler") else {}
    for prediction, spacing, offset in itertools.product(predictions, ["linspace", "leading", "trailing"], [0, 1]):
        if name in SLOW_TO_MAKE and offset:
            continue
        alike(name, {**SD, **clip, "prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": offset})


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
                                  "DPMSolverSinglestepScheduler", "SASolverScheduler"])  # fmt: skip
def test_orders_and_levels_of_the_solvers(name, no_own_step):
    names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    grids = [{}, *({name: True} for name in names), FLOW_SIGMAS]
    takes = inspect.signature(getattr(diffusers, name).__init__).parameters
    for grid, final, order in itertools.product(grids, ["zero", "sigma_min"], [1, 2, 3]):
        options = {**grid, "final_sigmas_type": final, "solver_order": order, "predictor_order": order, "corrector_order": order}
        if not all(k in takes for k in grid):
            continue
        if name == "DPMSolverSinglestepScheduler" and order > 1:
            options["lower_order_final"] = True  # an odd number of steps
        alike(name, {**SD, **{k: v for k, v in options.items() if k in takes}}, steps=6)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_schedules(name, beta_schedule, no_own_step):
    clip = {"clip_sample": False} if name in ("DDPMScheduler", "DDIMScheduler") else {}
    for zero_snr in (False, True):
        alike(name, {**SD, **clip, "beta_schedule": beta_schedule, "rescale_betas_zero_snr": zero_snr,
                     "prediction_type": "v_prediction", "timestep_spacing": "trailing"})  # fmt: skip


FEWER = {"consistency": 40, "consistency clip": 40}  # 40 is all they know


@pytest.mark.parametrize("name", LINEAR)
def test_fifty_steps(name, monkeypatch, no_own_step):
    """With the exact denoiser of two Gaussians."""
    steps = FEWER.get(name, 50)
    results = []
    for scheduler in (made(name), fuse(made(name))):
        monkeypatch.setattr(schedulers, "model", network(scheduler) or model)
        torch.manual_seed(0)
        results.append(sample(scheduler, CONFIGS[name], steps=steps))
    assert relative(results[1], results[0]) < 1e-4


@pytest.mark.parametrize("name", ["dpm++ 2m", "dpm 2m", "dpm++ 2m sde", "dpm++ 3m", "unipc bh2", "ddim", "euler", "flow euler"])
def test_every_number_of_steps(name, no_own_step):
    for steps in (1, 2, 3, 4, 7, 14, 15, 16):  # the last order changes at 15
        parent, fused = made(name), fuse(made(name))
        assert relative(sample(fused, CONFIGS[name], steps=steps), sample(parent, CONFIGS[name], steps=steps)) < 1e-4, steps


@pytest.mark.parametrize("begin", [True, False], ids=["begin index", "by timestep"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_run_that_begins_later(name, begin, no_own_step):
    """As of image to image. The index of the first step is set, or found from its timestep."""
    results = []
    for scheduler in (made(name), fuse(made(name))):
        if not begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index = lambda index: None
        torch.manual_seed(0)
        results.append(sample(scheduler, CONFIGS[name], steps=9, start=4, x=torch.linspace(-1, 1, 216).view(2, 3, 6, 6)))
    assert relative(results[1], results[0]) < 1e-4


# ---- what step takes and returns


@pytest.mark.parametrize("name", LINEAR)
def test_what_a_step_returns(name):
    """Types, keys, lengths, shapes, dtypes, for both values of return_dict; and the same numbers for both."""
    shape, got = (2, 3, 4, 6), {}
    for which, scheduler in (("own", made(name)), ("fused", fuse(made(name)))):
        for return_dict in (True, False):
            s = prepared(copy.deepcopy(scheduler), CONFIGS[name])
            t = s.timesteps[0].expand(2) if CONFIGS[name].name == "DDPMWuerstchenScheduler" else s.timesteps[0]
            x = torch.linspace(-1, 1, 144).view(shape)
            inside = s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x
            step = getattr(s, "step", None) or s.step_pred
            options = {**CONFIGS[name].step, "return_dict": return_dict}
            if "generator" in inspect.signature(step).parameters:
                options["generator"] = torch.Generator().manual_seed(0)
            torch.manual_seed(0)
            positional = (None, t, None, x) if CONFIGS[name].name == "CogVideoXDPMScheduler" else (t, x)
            got[which, return_dict] = step(model(inside, t), *positional, **options)
    for return_dict in (True, False):
        own, fused = got["own", return_dict], got["fused", return_dict]
        assert type(fused) is type(own) and len(fused) == len(own)
        if isinstance(own, dict):
            assert list(own) == list(fused)
            own, fused = list(own.values()), list(fused.values())
        for a, b in zip(own, fused):
            assert b.shape == a.shape == shape and b.dtype == a.dtype and relative(b, a) < 1e-4
    both = [got["fused", return_dict] for return_dict in (True, False)]
    assert torch.equal(both[0].prev_sample if hasattr(both[0], "prev_sample") else both[0][0], both[1][0])


@pytest.mark.parametrize("shape", [(2, 16), (2, 5, 16), (1, 4, 3, 4, 4), (1, 2, 1, 1, 1, 3), (3, 1, 1, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("noise", fd.integrations.diffusers.NOISES)
def test_latents_of_any_shape(shape, noise, no_own_step):
    for name in ("ddpm", "ddim", "euler ancestral", "dpm++ 2m sde", "unipc bh2", "flow euler"):
        fused = sample(fuse(made(name), noise), CONFIGS[name], steps=4, shape=shape)
        assert fused.shape == shape and torch.isfinite(fused).all()
        if noise == "torch":
            assert relative(fused, sample(made(name), CONFIGS[name], steps=4, shape=shape)) < 1e-4


# ---- beside the steps


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_added_as_ever(name):
    """Before set_timesteps, after it, between two steps, to a half-precision image; and the run is not disturbed."""
    parent, fused = made(name), fuse(made(name))
    method = next((m for m in ("add_noise", "scale_noise") if hasattr(parent, m)), None)
    if method is None:
        pytest.skip(f"{type(parent).__name__} adds no noise")
    image, noise = torch.linspace(-1, 1, 216).view(2, 3, 6, 6), torch.linspace(1, -1, 216).view(2, 3, 6, 6).cos()

    def added(scheduler, dtype=torch.float32, index=2):
        t = scheduler.timesteps[[index, index + 1]]
        x, n = image.to(dtype), noise.to(dtype)
        try:
            return getattr(scheduler, method)(*((x, t, n) if method == "scale_noise" else (x, n, t)))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:  # some take less: then both raise the same
            return f"{type(error).__name__}: {error}"

    results = []
    for scheduler in (parent, fused):
        prepared(scheduler, CONFIGS[name])
        found = [added(scheduler), added(scheduler, torch.float16)]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(1)
            found.append(added(scheduler))
        if hasattr(scheduler, "get_velocity"):
            found.append(scheduler.get_velocity(image, noise, scheduler.timesteps[[0, 1]]))
        results.append(found)
    for a, b in zip(*results):
        assert type(a) is type(b) and (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)


@pytest.mark.parametrize("name", ["ddpm", "euler", "dpm++ 2m", "heun", "unipc bh2", "flow euler"])
def test_noise_added_between_steps_leaves_the_run_alone(name, no_own_step):
    results = []
    for scheduler in (made(name), fuse(made(name))):
        prepared(scheduler, CONFIGS[name])
        x = torch.linspace(-1, 1, 216).view(2, 3, 6, 6)
        generator, kept = torch.Generator().manual_seed(0), []
        options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for t in scheduler.timesteps:
            inside = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            method = "add_noise" if hasattr(scheduler, "add_noise") else "scale_noise"
            order = (torch.ones_like(x), t[None]) if method == "add_noise" else (t[None], torch.ones_like(x))
            kept.append(getattr(scheduler, method)(x, *order))
            x = scheduler.step(model(inside, t), t, x, **options)[0]
        results.append([*kept, x])
    assert all(relative(b, a) < 1e-4 for a, b in zip(*results))


@pytest.mark.parametrize("name", ["euler", "euler ancestral", "heun", "kdpm2", "lms", "dpm++ sde", "edm euler", "dpm++ 2m"])
@pytest.mark.parametrize("times", [0, 1, 3])
def test_scale_model_input_called_never_or_often(name, times):
    results = []
    for scheduler in (made(name), fuse(made(name))):
        prepared(scheduler, CONFIGS[name])
        x, found = torch.linspace(-1, 1, 216).view(2, 3, 6, 6) * 10, []
        for t in scheduler.timesteps[:4]:
            for _ in range(times):
                found.append(scheduler.scale_model_input(x, t))
            x = scheduler.step(model(x, t), t, x)[0] if "ancestral" not in name else scheduler.step(
                model(x, t), t, x, generator=torch.Generator().manual_seed(1))[0]  # fmt: skip
            found.append(x)
        results.append((found, getattr(scheduler, "is_scale_input_called", None), getattr(scheduler, "step_index", None)))
    (own, *state), (fused, *other) = results
    assert state == other and all(relative(b, a) < 1e-4 for a, b in zip(own, fused))


# ---- the same every time


@pytest.mark.parametrize("noise", fd.integrations.diffusers.NOISES)
@pytest.mark.parametrize("name", LINEAR)
def test_the_same_run_gives_the_same_bits(name, noise):
    """Again, in a copy, after a run of another number of steps, and in a scheduler made anew."""
    if name in ("dpm++ sde", "flow euler stochastic", "sa solver", "cosine dpm"):
        pytest.skip("its step takes no generator, or draws a seed when it is made")
    fused = fuse(made(name), noise)

    def run(scheduler, steps=5):
        return sample(scheduler, CONFIGS[name], steps=steps, generator=torch.Generator().manual_seed(3))

    first = run(fused)
    assert torch.equal(run(fused), first)
    assert torch.equal(run(copy.deepcopy(fused)), first)
    run(fused, steps=4)
    assert torch.equal(run(fused), first)
    assert torch.equal(run(fuse(made(name), noise)), first)


def test_options_that_differ_from_call_to_call(no_own_step):
    """Keyword or positional, and eta that changes in mid-run: each call is taken for itself."""
    results = []
    for s in (made("ddim"), fuse(made("ddim"))):
        s.set_timesteps(6)
        x, generator = torch.linspace(-1, 1, 216).view(2, 3, 6, 6), torch.Generator().manual_seed(0)
        calls = [
            lambda m, t, x, s=s, g=generator: s.step(m, t, x, 0.0, False, g)[0],
            lambda m, t, x, s=s, g=generator: s.step(model_output=m, timestep=t, sample=x, eta=0.3, generator=g).prev_sample,
            lambda m, t, x, s=s, g=generator: s.step(m, int(t), x, eta=1.0, generator=g, return_dict=False)[0],
            lambda m, t, x, s=s, g=generator: s.step(m, t, x, eta=0.5, variance_noise=torch.cos(x))[0],
            lambda m, t, x, s=s, g=generator: s.step(m, t, x)[0],
            lambda m, t, x, s=s, g=generator: s.step(m, t, sample=x, eta=0.2, generator=g)[0],
        ]
        for t, step in zip(s.timesteps, calls):
            x = step(model(x, t), t, x)
        results.append(x)
    assert relative(results[1], results[0]) < 1e-4
