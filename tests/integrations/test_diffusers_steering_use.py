"""Steering inside of diffusers' schedulers: copies, orders of calls, pipelines, and what is refused."""

import copy
import functools
import pickle
from dataclasses import replace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers
from fastdiff.steering import LatentVector
from integrations.schedulers import CONFIGS, SD, made, relative, sample
from integrations.test_diffusers_steering import ALIGNMENT, SHAPE, VECTOR, WINDOW, at, level, steered_by_hand
from integrations.test_pipelines import dit

fuse = fd.integrations.diffusers.fuse
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*Should have t")


# ---- the run around it


def test_other_batches_runs_and_copies(no_own_step):
    config, action = CONFIGS["dpm++ 2m"], at()
    fused = fuse(made("dpm++ 2m"), steering=[action])
    first = sample(fused, config)
    assert relative(sample(fused, config, x=torch.cat([first, first])), first.repeat(2, 1, 1, 1)) > 1e-3  # another start
    assert torch.equal(sample(fused, config), first)
    for twin in (copy.deepcopy(fused), fuse(fused, steering=[action])):
        assert torch.equal(sample(twin, config), first)
    pushed_scheduler = fuse(made("dpm++ 2m"), steering=[VECTOR.at(1.0, target="one")])
    twin = pickle.loads(pickle.dumps(pushed_scheduler))
    assert torch.equal(sample(twin, config), sample(pushed_scheduler, config))
    assert not torch.equal(sample(fuse(fused), config), first)  # fused anew without
    assert torch.equal(sample(type(fused).from_config(fused.config), config), sample(fuse(made("dpm++ 2m")), config))
    fused.set_timesteps(8)
    x = torch.ones(1, *SHAPE)
    for t in fused.timesteps[:3]:
        x = fused.step(x / 2, t, x)[0]
    twin = copy.deepcopy(fused)
    for t in fused.timesteps[3:]:
        results = [s.step(x / 2, t, x)[0] for s in (fused, twin)]
        assert torch.equal(*results)
        x = results[0]


def test_a_scheduler_without_history_in_any_order(no_own_step):
    """DDIM goes by its timesteps, not by a count."""
    fused = fuse(made("ddim"), steering=[VECTOR.at(1.0, (0.2, 1e13), "one")])
    parent = made("ddim")
    for scheduler in (fused, parent):
        scheduler.set_timesteps(10)
    x = torch.linspace(-1, 1, 108).view(1, *SHAPE)
    for place in (6, 2, 2, 9):
        t = parent.timesteps[place]
        s = _s(parent, t)
        output = x / 2 - (VECTOR.vectors[0] / s if s >= 0.2 else 0)
        assert relative(fused.step(x / 2, int(t), x)[0], parent.step(output, t, x)[0]) < 1e-5
    with pytest.raises(ValueError, match="timestep 7 is none of scheduler.timesteps"):
        fused.step(x, 7, x)


def _s(scheduler, t):
    alpha, sigma = level(scheduler, t, 0)
    return sigma / alpha


# ---- what is refused, and when


def test_windows_are_looked_at_before_a_run():
    fused = fuse(made("ddim"), steering=[VECTOR.at(1.0, (200.0, 300.0), "one")])
    said = r"no call of the model falls into window \(200, 300\): the plan \('DDIMScheduler'\) calls it at sigma"
    with pytest.raises(ValueError, match=said):
        fused.set_timesteps(10)
    heun = fuse(made("heun"), steering=[VECTOR.at(1.0, None, "one", steps=(10, 12))])
    with pytest.raises(ValueError, match="in steps 0 to 9"):
        heun.set_timesteps(10)
    heun.set_timesteps(11)


@pytest.mark.parametrize("name", ["ipndm", "ltx euler ancestral", "consistency", "repaint", "wuerstchen"])
def test_schedulers_that_do_not_say_their_levels(name):
    config = CONFIGS[name]
    with pytest.raises(ValueError, match=f"{config.name} cannot be steered"):
        sample(fuse(made(name), steering=[VECTOR.at(1.0, target="one")]), config)


@pytest.mark.parametrize(
    "name, action, message",
    [
        ("ddim", lambda: LatentVector(torch.ones(1, 4, 4, 4)).at(1.0), r"shape"),
        ("ddim", lambda: at([1.0, 2.0, 3.0], WINDOW, "up"), r"weight has shape \(3,\), the batch has 2"),
        ("ddim", lambda: at(1.0, WINDOW, ["up"] * 3), "target has 3 entries"),
        ("ddim", lambda: at(1.0, WINDOW, "upp"), "did you mean 'up'"),
        ("ddim clip", lambda: at(1.0, WINDOW, "up"), r"clips its estimates to -0.8 to 0.8"),
    ],
)
def test_shapes_and_weights_are_looked_at_by_the_first_step(name, action, message):
    fused = fuse(made(name), steering=[action()])
    fused.set_timesteps(10)
    x = torch.ones(2, *SHAPE)
    with pytest.raises(ValueError, match=message):
        fused.step(x, fused.timesteps[0], x)


def test_actions_that_cannot_act_in_a_step():
    def log_p(x, y):
        return x.flatten(1).sum(1)

    for action, name in (
        (fd.guidance.dps(log_p, 0), "TrainingFree"),
        (fd.guidance.cfg_rescale(), "Arithmetic"),
        (fd.guidance.apg(), "Arithmetic"),
        (fd.guidance.cfg_pp(), "CfgPp"),
        (fd.guidance.dynamic_threshold(0.9), "DynamicThreshold"),
    ):
        with pytest.raises(TypeError, match=f"steering has {name}, which"):
            fuse(made("ddim"), steering=[action])
    with pytest.raises(TypeError, match="steering is NoiseAlignment: a list of actions"):
        fuse(made("ddim"), steering=ALIGNMENT)

    class Doubles:
        """d becomes twice what it was, by writing into the next base."""

        def begin(self, setting):
            acting = fd.action.Acting()
            rows = [replace(row, y=({"d": 2.0},)) for row in setting.plan.rows]
            acting.plan = fd.Plan.from_rows(rows)
            return acting

    fused = fuse(made("ddim"), steering=Doubles())
    fused.set_timesteps(5)
    x = torch.ones(2, *SHAPE)
    with pytest.raises(ValueError, match="changes more of a step than its denoised estimate"):
        fused.step(x, fused.timesteps[0], x)


def test_an_action_of_ones_own(no_own_step):
    """One more input: d += 0.5 x at every level above 1."""

    class Mine:
        def begin(self, setting):
            acting = Adding()
            acting.plan = setting.plan.with_input("mine", lambda s: 0.5 * (s > 1))
            return acting

    class Adding(fd.action.Acting):
        def outputs(self, run, evaluate):
            return (*evaluate(), run.model_input / self.plan.input_scales[run.row])

    expected = sample(steered_by_hand(made("dpm++ 2m"), lambda x, s: 0.5 * x, (1.0, 1e13)), CONFIGS["dpm++ 2m"])
    assert relative(sample(fuse(made("dpm++ 2m"), steering=[Mine()]), CONFIGS["dpm++ 2m"]), expected) < 1e-3


# ---- pipelines


def test_a_pipeline_with_guidance_of_its_own(no_own_step):
    """Two pictures, with weights of their own, guided: DiT's pipeline hands each latent to the scheduler twice."""
    push = LatentVector(fd.randn((1, 4, 4, 4), seeds=4))
    weights = torch.tensor([0.3, -0.2] * 2, dtype=torch.float64).view(4, 1, 1, 1)

    def pictures(scheduler, steering=()):
        pipe = dit(scheduler)
        pipe.set_progress_bar_config(disable=True)
        if steering:
            fuse(pipe, steering=steering)
        made = pipe(class_labels=[1, 2], guidance_scale=3.0, num_inference_steps=8, generator=torch.Generator().manual_seed(0),
                    output_type="np")  # fmt: skip
        return torch.as_tensor(made.images)

    def scheduler():
        return diffusers.DPMSolverMultistepScheduler(**SD)

    by_hand = scheduler()
    own, places = by_hand.step, []

    @functools.wraps(own)
    def step(output, t, x, **options):
        s = float(by_hand.sigmas[len(places)])
        places.append(s)
        if s >= 0.5:
            output = output - (weights * push.vectors.double() / s).to(output.dtype)
        return own(output, t, x, **options)

    by_hand.step = step
    expected = pictures(by_hand)
    assert len(places) == 8 and min(places) < 0.5
    got = pictures(scheduler(), [push.at([0.3, -0.2] * 2, (0.5, 1e13))])
    assert float((got - expected).abs().max()) < 1e-4
    assert float((pictures(scheduler()) - expected).abs().max()) > 0.01
