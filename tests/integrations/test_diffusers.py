"""diffusers' schedulers, fused, against themselves."""

import copy
import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from integrations.schedulers import CONFIGS, made, model, relative, sample

fuse = fd.integrations.diffusers.fuse
NAMES = list(CONFIGS)
LINEAR = [name for name in NAMES if CONFIGS[name].fused]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Should have t")


@pytest.mark.parametrize("name", LINEAR)
def test_linear_schedulers_give_the_same_latents(name, no_own_step):
    parent, fused = made(name), fuse(made(name))
    theirs, ours = [], []
    expected = sample(parent, CONFIGS[name], outputs=theirs)
    got = sample(fused, CONFIGS[name], outputs=ours)
    assert torch.isfinite(expected).all()
    assert relative(got, expected) < 1e-4
    assert [len(r) for r in ours] == [len(r) for r in theirs]
    for r, s in zip(ours, theirs):
        for a, b in zip(r, s):
            assert (a is None) == (b is None)
            if b is not None:
                assert a.dtype == b.dtype and float((a - b).abs().max()) <= 1e-4 * max(
                    float(b.abs().max()), float(s[0].abs().max())
                )


@pytest.mark.parametrize("name", [n for n in NAMES if not CONFIGS[n].fused])
def test_what_is_not_linear_is_the_schedulers_own_and_says_so_once(name):
    parent, fused = made(name), fuse(made(name))
    expected = sample(parent, CONFIGS[name])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = sample(fused, CONFIGS[name])
        again = sample(fused, CONFIGS[name])
    said = [str(w.message) for w in caught if "own step is used" in str(w.message)]
    assert len(said) == 1, said
    assert torch.equal(got, expected) and torch.equal(again, expected)


# ---- the scheduler stays what it was


@pytest.mark.parametrize("name", ["ddpm", "euler", "dpm++ 2m", "unipc bh2", "flow euler", "heun"])
def test_a_fused_scheduler_is_one_of_its_class(name, tmp_path):
    parent = made(name)
    fused = fuse(parent)
    cls = type(parent)
    assert isinstance(fused, cls) and type(fused).__name__ == cls.__name__ and fused is not parent
    assert inspect.signature(fused.step) == inspect.signature(parent.step)
    assert inspect.signature(fused.set_timesteps) == inspect.signature(parent.set_timesteps)
    assert len(fused) == len(parent) and fused.order == parent.order and dict(fused.config) == dict(parent.config)
    fused.save_pretrained(tmp_path / "fused")
    parent.save_pretrained(tmp_path / "parent")
    assert (tmp_path / "fused/scheduler_config.json").read_text() == (tmp_path / "parent/scheduler_config.json").read_text()
    loaded = cls.from_pretrained(tmp_path / "fused")
    assert type(loaded) is cls
    again = type(fused).from_config(fused.config)
    assert type(again) is type(fused) and again.to_json_string() == loaded.to_json_string()
    assert relative(sample(again, CONFIGS[name]), sample(loaded, CONFIGS[name])) < 1e-4
    assert fused.compatibles == parent.compatibles
    x, noise = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    for scheduler in (parent, fused):
        scheduler.set_timesteps(8)
    assert torch.equal(parent.timesteps, fused.timesteps)
    if hasattr(parent, "add_noise"):
        t = parent.timesteps[[2, 3]]
        assert torch.equal(fused.add_noise(x, noise, t), parent.add_noise(x, noise, t))


@pytest.mark.parametrize("name", ["ddim", "euler ancestral", "dpm++ 2m"])
def test_what_step_returns(name):
    parent, fused = made(name), fuse(made(name))
    results = []
    for scheduler in (parent, fused):
        scheduler.set_timesteps(5)
        x = torch.linspace(-1, 1, 108).view(1, 3, 6, 6)
        options = (
            {"generator": torch.Generator().manual_seed(0)}
            if "generator" in inspect.signature(scheduler.step).parameters
            else {}
        )
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        results.append(scheduler.step(x / 2, scheduler.timesteps[0], x, **options))
    assert type(results[0]) is type(results[1]) and results[0].keys() == results[1].keys()
    assert all(relative(results[1][k], results[0][k]) < 1e-5 for k in results[0])


@pytest.mark.parametrize("name", ["ddpm", "dpm++ 2m sde", "unipc bh2", "heun", "pndm plms"])
def test_counters_and_history_are_where_the_scheduler_has_them(name):
    """Pipelines look at them: after each step, every attribute has the value that it has in the scheduler itself."""
    parent, fused = made(name), fuse(made(name))
    for scheduler in (parent, fused):
        scheduler.set_timesteps(6)
    x = y = torch.linspace(-1, 1, 108).view(1, 3, 6, 6)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for t in parent.timesteps:
        has = "generator" in inspect.signature(parent.step).parameters
        x, y = (
            s.step(model(s.scale_model_input(v, t), t), t, v, **({"generator": g} if has else {}))[0]
            for s, v, g in ((parent, x, generators[0]), (fused, y, generators[1]))
        )
        _assert_alike(
            {k: v for k, v in vars(parent).items()}, {k: v for k, v in vars(fused).items() if not k.startswith("_fastdiff")}
        )


def _assert_alike(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            _assert_alike(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            _assert_alike(x, y)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
    else:
        assert a is b or a == b


# ---- where a run starts, and how it goes on


@pytest.mark.parametrize(
    "name", ["ddpm", "euler", "dpm++ 2m", "dpm++ 2m sde", "unipc bh2", "heun", "kdpm2 ancestral", "flow euler", "lcm"]
)
@pytest.mark.parametrize("begin", [True, False], ids=["begin index", "by timestep"])
def test_image_to_image(name, begin, no_own_step):
    results = []
    for scheduler in (made(name), fuse(made(name))):
        if not begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index = lambda index: None
        image = torch.linspace(-1, 1, 216).view(2, 3, 6, 6)
        results.append(sample(scheduler, CONFIGS[name], start=8, x=image))
    assert relative(results[1], results[0]) < 1e-4


@pytest.mark.parametrize(
    "name, options",
    [
        ("ddpm", {"timesteps": [900, 700, 300, 100, 0]}),
        ("dpm++ 2m", {"timesteps": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]}),
        ("euler", {"sigmas": [14.6, 6.3, 3.8, 2.2, 1.3, 0.6, 0.2, 0.0]}),
        ("flow euler", {"sigmas": [1.0, 0.8, 0.5, 0.2]}),
    ],
)
def test_timesteps_and_levels_of_ones_own(name, options, no_own_step):
    results = []
    for scheduler in (made(name), fuse(made(name))):
        scheduler.set_timesteps(**options)
        x, generator = torch.linspace(-3, 3, 216).view(2, 3, 6, 6), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            inside = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(model(inside, t), t, x, generator=generator, return_dict=False)[0]
        results.append(x)
    assert relative(results[1], results[0]) < 1e-4


def test_inpainting_changes_the_latent_between_the_steps(no_own_step):
    results = []
    known, mask = torch.full((1, 3, 6, 6), 0.4), (torch.arange(6) > 2).float()
    for scheduler in (made("dpm++ 2m"), fuse(made("dpm++ 2m"))):
        scheduler.set_timesteps(12)
        x, noise = torch.linspace(-2, 2, 108).view(1, 3, 6, 6), torch.linspace(1, -1, 108).view(1, 3, 6, 6)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
            back = known if i == 11 else scheduler.add_noise(known, noise, scheduler.timesteps[i + 1 : i + 2])
            x = (1 - mask) * back + mask * x
        results.append(x)
    assert relative(results[1], results[0]) < 1e-4


@pytest.mark.parametrize("name", ["ddpm", "ddim eta"])
def test_a_scheduler_without_history_takes_any_timestep(name, no_own_step):
    """As it does by itself: before set_timesteps, out of order, as ints, in another shape each time."""
    parent, fused = made(name), fuse(made(name))
    for steps in (None, 10):
        for t, shape in (
            (500, (1, 3, 4, 4)),
            (100, (2, 3, 4, 4)),
            (torch.tensor(700), (2, 1, 5)),
            (500, (1, 3, 4, 4)),
            (0, (1, 2)),
        ):
            if steps is None and name.startswith("ddim"):  # it raises
                continue
            a = torch.linspace(-1, 1, 96)[: torch.Size(shape).numel()].view(shape)
            results = [
                s.step(a / 2, t, a, generator=torch.Generator().manual_seed(3), **CONFIGS[name].step)[0]
                for s in (parent, fused)
            ]
            assert relative(results[1], results[0]) < 1e-5
        for scheduler in (parent, fused):
            scheduler.set_timesteps(10)


def test_a_step_out_of_order_is_refused():
    fused = fuse(made("dpm++ 2m"))
    fused.set_timesteps(10)
    x, t = torch.ones(1, 3, 4, 4), fused.timesteps
    fused.step(x, t[0], x)
    with pytest.raises(ValueError, match=r"step 1 of the run was called with timestep \d+, which is step 4"):
        fused.step(x, t[4], x)
    with pytest.raises(ValueError, match="which is step 0"):
        fused.step(x, int(t[0]), x)
    after = [fused.step(x, s, x)[0] for s in t[1:]][-1]  # the run is as it was
    assert torch.isfinite(after).all()
    with pytest.raises(IndexError, match="all 10 steps have been taken"):
        fused.step(x, t[9], x)
    fused.set_timesteps(10)
    fused.step(x, t[0], x)


def test_another_shape_in_mid_run_is_refused():
    fused = fuse(made("dpm++ 2m"))
    fused.set_timesteps(10)
    x = torch.ones(1, 3, 4, 4)
    fused.step(x, fused.timesteps[0], x)
    larger = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"sample has shape \(2, 3, 4, 4\) on cpu, the run was begun with \(1, 3, 4, 4\)"):
        fused.step(larger, fused.timesteps[1], larger)
    fused.step(x, fused.timesteps[1], x)
    fused.set_timesteps(10)
    fused.step(larger, fused.timesteps[0], larger)


@pytest.mark.parametrize("noise", fd.integrations.diffusers.NOISES)
@pytest.mark.parametrize("count", [2, 4])
def test_generators_of_the_wrong_number_are_refused(noise, count):
    fused = fuse(made("ddpm"), noise)
    fused.set_timesteps(5)
    x = torch.ones(3, 3, 4, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    states = [g.get_state() for g in generators]
    with pytest.raises(ValueError, match=f"generator is a list of {count}, the batch has 3"):
        fused.step(x, fused.timesteps[0], x, generator=generators)
    assert all(torch.equal(g.get_state(), s) for g, s in zip(generators, states))


@pytest.mark.parametrize("name", ["dpm++ sde", "cosine dpm"])
def test_brownian_noise_of_torchsde(name, no_own_step):
    """The scheduler's own tree: the same pictures with noise="torch", and beside philox where it is asked for."""
    made(name)  # skips where torchsde is missing
    config = CONFIGS[name]
    expected = sample(made(name), config, generator=torch.Generator().manual_seed(3))
    for options in ({}, {"brownian": "torchsde"}, {"noise": "philox", "brownian": "torchsde"}):
        fused = fuse(made(name), **options)
        assert relative(sample(fused, config, generator=torch.Generator().manual_seed(3)), expected) < 1e-4
        again = pickle.loads(pickle.dumps(fuse(made(name), **options)))
        assert relative(sample(again, config, generator=torch.Generator().manual_seed(3)), expected) < 1e-4
    other = sample(fuse(made(name), "philox"), config, generator=torch.Generator().manual_seed(3))
    assert relative(other, expected) > 0.05
    with pytest.raises(ValueError, match="did you mean 'torchsde'"):
        fuse(made(name), brownian="torchsd")
    drawn = fuse(made("ddpm"), "philox", brownian="torchsde")  # other noise is philox still
    assert torch.equal(sample(drawn, CONFIGS["ddpm"]), sample(fuse(made("ddpm"), "philox"), CONFIGS["ddpm"]))


def test_fused_again_with_other_noise():
    parent = made("ddpm")
    one = fuse(parent)
    two = fuse(one, noise="philox")
    three = fuse(two)
    assert (
        type(one) is type(three) is not type(two)
        and isinstance(two, type(parent))
        and type(two).__mro__.count(type(parent)) == 1
    )
    results = [sample(s, CONFIGS["ddpm"]) for s in (one, two, three)]
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_wrong_arguments_of_fuse():
    with pytest.raises(ValueError, match="did you mean 'philox'"):
        fuse(made("ddpm"), noise="pilox")
    with pytest.raises(TypeError, match="pipe_or_scheduler is int"):
        fuse(3)
    fused = fuse(made("euler"))
    fused.set_timesteps(5)
    x = torch.ones(1, 3, 4, 4)
    with pytest.raises(ValueError, match="integer ind"):  # the scheduler's own words
        fused.step(x, 3, x)
    with pytest.raises(TypeError):
        fused.step(x, fused.timesteps[0])


def test_two_runs_at_once_and_copies_in_mid_run():
    name = "dpm++ 2m sde"
    expected = [sample(made(name), CONFIGS[name], generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    one, other = fuse(made(name)), fuse(made(name))
    x, generators, schedulers = [], [torch.Generator().manual_seed(s) for s in (1, 2)], [one, other]
    for s, g in zip(schedulers, generators):
        s.set_timesteps(20)
        x.append(torch.randn((2, 3, 6, 6), generator=g) * s.init_noise_sigma)
    for i, t in enumerate(one.timesteps):
        for k, (s, g) in enumerate(zip(schedulers, generators)):
            x[k] = s.step(model(x[k], t), t, x[k], generator=g)[0]
        if i == 7:
            schedulers = [copy.deepcopy(one), pickle.loads(pickle.dumps(other))]
            assert type(schedulers[0]) is type(one) and type(schedulers[1]) is type(other)
        if i == 10:  # the originals went no further
            assert one.step_index == other.step_index == 8
    assert all(relative(a, b) < 1e-4 for a, b in zip(x, expected))


def test_a_run_that_a_row_cannot_take_goes_on_by_itself():
    """float64 in mid-run: the scheduler's own step takes over, with the history that it would have."""
    parent, fused = made("dpm++ 2m"), fuse(made("dpm++ 2m"))
    results = []
    for scheduler in (parent, fused):
        scheduler.set_timesteps(10)
        x = torch.linspace(-2, 2, 108).view(1, 3, 6, 6)
        for i, t in enumerate(scheduler.timesteps):
            x = x.double() if i == 4 else x
            if i == 4 and scheduler is fused:
                with pytest.warns(UserWarning, match="own step is used"):
                    x = scheduler.step(model(x, t), t, x)[0]
            else:
                x = scheduler.step(model(x, t), t, x)[0]
        results.append(x)
    assert relative(results[1], results[0]) < 1e-5


def test_attributes_set_from_outside_count(no_own_step):
    """History handed to a scheduler, as some pipelines and tests do."""
    results = []
    for scheduler in (made("dpm++ 2m"), fuse(made("dpm++ 2m"))):
        scheduler.set_timesteps(10)
        x = torch.linspace(-1, 1, 108).view(1, 3, 6, 6)
        scheduler.model_outputs = [x / 3, x * x]
        scheduler.lower_order_nums = 2
        scheduler._step_index = 4
        results.append([scheduler.step(x, t, x)[0] for t in scheduler.timesteps[4:6]])
    assert all(relative(b, a) < 1e-5 for a, b in zip(*results))
