"""Samplers against their formulas as they are written in papers and in ComfyUI, and against k-diffusion where it has
them: every model call and the end, in float64, at 10 and 20 steps."""

import numpy as np
import pytest
import torch
from plan.harness import Noises, denoise, k_diffusion, predict, relative, run
from plan.published import PUBLISHED, Calls

from fastdiff.plan import plan
from fastdiff.samplers.stage import Noise
from fastdiff.schedules import EDM, VP, Flow

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SCHEDULE = EDM(0.02, 80)


def compare(made, noises, start, calls, end, record):
    """Model inputs call by call, and the end."""
    trace = []
    ours = run(made, lambda x, s, _: denoise(x, s), noises, start=start, trace=trace)
    errors = [relative(mine, theirs) for (_, _, mine, _), theirs in zip(trace, calls, strict=True)] + [relative(ours, end)]
    record("relative_error", max(errors))
    assert max(errors) < 1e-10, f"call {np.argmax(errors)}: {max(errors):.3g}"


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("case", PUBLISHED)
def test_follows_its_formula(case, steps, record_property):
    formula, theirs, name, ours = PUBLISHED[case]
    levels, noises = SCHEDULE.grid("karras", steps), Noises()
    start = levels[0] * np.float64(noises[Noise("init", 0)])
    made = plan(name, schedule=SCHEDULE, sigmas=levels, prediction="denoised", start="latent", **ours)
    calls = Calls(denoise)
    end = formula(calls, start, levels.tolist(), lambda draw: np.float64(noises[Noise("step", draw)]), **theirs)
    compare(made, noises, start, [x for x, _ in calls], end, record_property)
    assert made.sigmas[made.calls_model] == pytest.approx([s for _, s in calls], rel=1e-12)


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize(
    "case", ["heunpp2", "ipndm", "ipndm 3", "res_multistep", "gradient_estimation", "lms", "dpm_2_ancestral, eta 0"]
)
def test_of_a_flow_the_formula_is_that_in_t(case, steps, record_property):
    """As ComfyUI runs them: x_t = (1 - t) x0 + t n in the place of x, and t in the place of sigma."""
    flow, noises = Flow(shift=2.0), Noises()
    times = np.append(flow.shifted(np.linspace(0.97, 0.02, steps)), 0.0)
    start = np.float64(noises[Noise("init", 0)])

    def in_t(x, t):
        return denoise(x / (1 - t), t / (1 - t))

    if case in PUBLISHED:
        formula, theirs, name, ours = PUBLISHED[case]
        calls = Calls(in_t)
        end, seen = formula(calls, start, times.tolist(), lambda draw: 0.0, **theirs), calls
    else:
        name, ours = case.split(",")[0], {"eta": 0.0} if "eta" in case else {}
        seen = Calls(in_t)
        end = getattr(k_diffusion(), f"sample_{name}")(
            lambda x, t: torch.from_numpy(seen(x.numpy(), float(t[0]))),
            torch.from_numpy(start),
            torch.from_numpy(times),
            disable=True,
            **ours,
        )
    made = plan(name, schedule=flow, sigmas=flow.sigma_ve(times), prediction="denoised", start="latent", **ours)
    trace = []
    mine = run(made, lambda x, s, _: in_t(x, s / (1 + s)), noises, start=start, trace=trace)
    errors = [relative(a, b) for (_, _, a, _), (b, _) in zip(trace, seen, strict=True)] + [relative(mine, end)]
    record_property("relative_error", max(errors))
    assert max(errors) < 1e-9


K_DIFFUSION = {
    "lms": ("lms", {}),
    "lms 2": ("lms", {"order": 2}),
    "dpm_2_ancestral": ("dpm_2_ancestral", {}),
    "dpm_2_ancestral, eta 0.6": ("dpm_2_ancestral", {"eta": 0.6, "s_noise": 0.9}),
    "dpm_fast": ("dpm_fast", {}),
    "dpm_fast, eta 0.8": ("dpm_fast", {"eta": 0.8, "s_noise": 1.05}),
}


@pytest.fixture
def float64():
    """As torch's default: k-diffusion's dpm_fast makes its levels in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("steps", [10, 11, 12, 20])
@pytest.mark.parametrize("case", K_DIFFUSION)
def test_follows_k_diffusion(case, steps, record_property, float64):
    name, options = K_DIFFUSION[case]
    levels, noises, draws, seen = SCHEDULE.grid("karras", steps), Noises(), iter(range(100)), []
    start = levels[0] * np.float64(noises[Noise("init", 0)])
    made = plan(name, schedule=SCHEDULE, sigmas=levels, prediction="denoised", start="latent", **options)

    def model(x, sigma):
        seen.append(x.numpy())
        return torch.from_numpy(denoise(x.numpy(), float(sigma[0])))

    given = (torch.from_numpy(levels),) if name != "dpm_fast" else (levels[-2], levels[0], steps)
    query = {"noise_sampler": lambda s, s_next: torch.from_numpy(np.float64(noises[Noise("step", next(draws))]))}
    end = getattr(k_diffusion(), f"sample_{name}")(
        model, torch.from_numpy(start), *given, disable=True, **options, **(query if name != "lms" else {})
    )
    assert made.evaluations == len(seen)
    compare(made, noises, start, seen, end.numpy(), record_property)


@pytest.mark.parametrize("steps", [10, 20])
def test_ipndm_follows_diffusers(steps, record_property):
    """Its scheduler has levels of its own, given here as `trained_betas`, and goes on to sigma = 0 at full order. The
    model predicts v there."""
    diffusers = pytest.importorskip("diffusers")
    levels = VP.scaled_linear().grid("karras", steps)
    scheduler = diffusers.IPNDMScheduler(trained_betas=(levels / np.hypot(1, levels)).tolist())
    scheduler.set_timesteps(steps)
    scheduler.betas = torch.from_numpy(levels / np.hypot(1, levels))
    scheduler.alphas = torch.from_numpy(1 / np.hypot(1, levels))
    noises, seen = Noises(), []
    start = np.float64(noises[Noise("init", 0)])
    latents = torch.from_numpy(start)
    for t, s in zip(scheduler.timesteps, levels):
        seen.append(latents.numpy())
        out = predict("v", latents.numpy(), s, float(1 / np.hypot(1, s)))
        latents = scheduler.step(torch.from_numpy(out), t, latents).prev_sample
    made = plan("ipndm", schedule=VP.scaled_linear(), sigmas=levels, prediction="v", start="latent", final_denoise=False)
    trace = []
    ours = run(made, lambda x, s, _: predict("v", x, s, 1 / np.hypot(1, s)), noises, start=start, trace=trace)
    errors = [relative(mine, theirs) for (_, _, mine, _), theirs in zip(trace, seen, strict=True)]
    record_property("relative_error", max(errors))
    assert max(errors + [relative(ours, latents.numpy())]) < 1e-10
