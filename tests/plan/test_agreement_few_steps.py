"""TCD, SCM and consistency models follow diffusers in float64: what the model is given at every call, and the end."""

import numpy as np
import pytest
import torch
from plan.harness import Noises, predict, relative, run

from fastdiff.plan import plan
from fastdiff.samplers.stage import Noise
from fastdiff.schedules import EDM, VP


@pytest.fixture
def peer(monkeypatch):
    """(scheduler, noises) -> its noise is ours, by address; sigmas and alpha_bar in float64."""
    def prepare(scheduler, noises):
        draws = iter(range(1000))
        module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])

        def drawn(*_, **__):
            return torch.from_numpy(np.float64(noises[Noise("step", next(draws))]))

        monkeypatch.setattr(module, "randn_tensor", drawn)
        for name in ("sigmas", "alphas_cumprod"):
            if isinstance(getattr(scheduler, name, None), torch.Tensor):
                setattr(scheduler, name, getattr(scheduler, name).double())
        return scheduler

    return prepare


def compare(made, model, noises, start, seen, end, record):
    trace = []
    ours = run(made, model, noises, start=start, trace=trace)
    errors = [relative(mine, theirs) for (_, _, mine, _), theirs in zip(trace, seen, strict=True)] + [relative(ours, end)]
    record("relative_error", max(errors))
    assert max(errors) < 1e-8, f"call {np.argmax(errors)}: {max(errors):.3g}"


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [4, 10, 20])
def test_tcd(steps, eta, record_property, peer):
    diffusers = pytest.importorskip("diffusers")
    noises = Noises()
    scheduler = diffusers.TCDScheduler()
    bar = scheduler.alphas_cumprod.numpy().astype(np.float64)
    schedule = VP(1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]]))
    peer(scheduler, noises).set_timesteps(steps)
    levels = schedule.sigma_ve(np.append(scheduler.timesteps.numpy(), 0))
    start, seen = np.float64(noises[Noise("init", 0)]), []
    latents = torch.from_numpy(start)
    for t, s in zip(scheduler.timesteps, levels):
        seen.append(latents.numpy())
        out = torch.from_numpy(predict("epsilon", latents.numpy(), s, float(schedule.alpha_at(s))))
        latents = scheduler.step(out, t, latents, eta=eta).prev_sample
    made = plan("tcd", schedule=schedule, sigmas=levels, start="latent", eta=eta)
    assert made.times[made.calls_model] == pytest.approx(scheduler.timesteps.numpy(), abs=1e-6)
    compare(made, lambda x, s, _: predict("epsilon", x, s, float(schedule.alpha_at(s))), noises, start, seen, latents.numpy(),
            record_property)


@pytest.mark.parametrize("steps", [2, 10, 20])
def test_scm(steps, record_property, peer):
    """TrigFlow at t is a VP schedule at sigma = tan(t), and its model's output is v."""
    diffusers = pytest.importorskip("diffusers")
    noises, schedule = Noises(), VP.linear()
    scheduler = peer(diffusers.SCMScheduler(), noises)
    scheduler.set_timesteps(steps, max_timesteps=1.55, intermediate_timesteps=None)
    scheduler.timesteps = scheduler.timesteps.double()
    levels = np.tan(scheduler.timesteps.numpy())
    start, seen = 0.5 * np.float64(noises[Noise("init", 0)]), []
    latents = torch.from_numpy(start)
    for t, s in zip(scheduler.timesteps[:-1], levels):
        seen.append(latents.numpy())
        out = torch.from_numpy(predict("v", latents.numpy(), s, float(torch.cos(t))))
        latents = scheduler.step(out, t, latents).prev_sample
    made = plan("scm", schedule=schedule, sigmas=levels, prediction="v", time="sigma", start="latent")
    assert np.arctan(made.times[made.calls_model]) == pytest.approx(scheduler.timesteps[:-1].numpy())
    compare(made, lambda x, s, _: predict("v", x, s, 1 / np.hypot(1, s)), noises, start, seen, latents.numpy(), record_property)


@pytest.mark.parametrize("steps", [2, 10, 20])
def test_consistency(steps, record_property, peer):
    diffusers = pytest.importorskip("diffusers")
    noises = Noises()
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(steps)
    peer(scheduler, noises)
    levels = scheduler.sigmas.numpy()
    start, seen = levels[0] * np.float64(noises[Noise("init", 0)]), []
    latents = torch.from_numpy(start)
    for t, s in zip(scheduler.timesteps, levels):
        given = scheduler.scale_model_input(latents, t)
        seen.append(given.numpy())
        out = torch.from_numpy(predict("edm", latents.numpy(), s, 1.0))
        latents = scheduler.step(out, t, latents).prev_sample
    made = plan("consistency", schedule=EDM(), sigmas=levels, start="latent")
    compare(made, lambda x, s, _: predict("edm", x * np.hypot(s, 0.5), s, 1.0), noises, start, seen, latents.numpy(),
            record_property)


def test_consistency_of_a_model_that_gives_its_estimate():
    """boundary=False: x' = d + sqrt(sigma'^2 - sigma_min^2) N, and d where sigma' is sigma_min or less."""
    made = plan("consistency", schedule=EDM(), sigmas=[80.0, 3.0, 0.002], prediction="denoised", boundary=False)
    first, last = made.rows[1:]
    assert first.y[0] == {"d": 1.0, Noise("step", 0): pytest.approx(np.sqrt(9 - 4e-6))} and last.y[0] == {"d": 1.0}
