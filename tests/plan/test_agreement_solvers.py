"""Multistep, single-step and predictor-corrector samplers follow diffusers in float64: what the model is given at every
call, and the end, at 10 and at 20 steps.

Levels are those of the scheduler; model outputs come from one smooth denoiser; noise is ours, by address.
"""

import numpy as np
import pytest
import torch
from plan.harness import Noises, predict, relative, run

from fastdiff.plan import plan
from fastdiff.samplers.stage import Noise
from fastdiff.schedules import VP

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KARRAS = {"use_karras_sigmas": True}
SINGLE = {
    f"singlestep {order} {algorithm} {solver}": (
        "DPMSolverSinglestep",
        {"solver_order": order, "algorithm_type": algorithm, "solver_type": solver, "lower_order_final": True,
         **(KARRAS if algorithm == "dpmsolver++" else {"final_sigmas_type": "sigma_min"})},
        "dpmpp_singlestep",
        {"order": order, "algorithm": algorithm, "solver_type": solver},
    )
    for order in (2, 3)
    for algorithm in ("dpmsolver++", "dpmsolver")
    for solver in ("midpoint", "heun")
}
UNIPC = {
    f"unipc {order} {kind}": ("UniPCMultistep", {"solver_order": order, "solver_type": kind, **KARRAS}, "unipc",
                              {"order": order, "solver_type": kind})
    for order in (1, 2, 3)
    for kind in ("bh1", "bh2")
}
DEIS = {f"deis {order}": ("DEISMultistep", {"solver_order": order}, "deis", {"order": order}) for order in (1, 2, 3)}
# case: (scheduler, its options, our sampler, our options)
CASES = {
    "lms": ("LMSDiscrete", KARRAS, "lms", {}),
    "lms, v": ("LMSDiscrete", {"prediction_type": "v_prediction"}, "lms", {}),
    **DEIS,
    **UNIPC,
    "unipc 3, v": ("UniPCMultistep", {"solver_order": 3, "prediction_type": "v_prediction"}, "unipc", {"order": 3}),
    "unipc 3, full order to the end": (
        "UniPCMultistep", {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        "unipc", {"order": 3, "lower_order_final": False},
    ),
    **SINGLE,
    "singlestep 3, v": (
        "DPMSolverSinglestep", {"solver_order": 3, "prediction_type": "v_prediction", "lower_order_final": True, **KARRAS},
        "dpmpp_singlestep", {"order": 3},
    ),
    "dpm_2_ancestral": ("KDPM2AncestralDiscrete", KARRAS, "dpm_2_ancestral", {}),
    "pndm": ("PNDM", {"skip_prk_steps": True, "set_alpha_to_one": True}, "pndm", {}),
    "pndm, Runge-Kutta start": ("PNDM", {"set_alpha_to_one": True}, "pndm", {"skip_prk": False}),
    "sa_solver": ("SASolver", {}, "sa_solver", {}),
    "sa_solver 3, 4": ("SASolver", {"predictor_order": 3, "corrector_order": 4}, "sa_solver",
                       {"predictor_order": 3, "corrector_order": 4}),
    "sa_solver 1, 1": ("SASolver", {"predictor_order": 1, "corrector_order": 1}, "sa_solver",
                       {"predictor_order": 1, "corrector_order": 1}),
}
VE_STATE = ("LMSDiscrete", "KDPM2AncestralDiscrete")
TOLERANCE = {"dpm_2_ancestral": 1e-5}  # its sigma_down and its midpoint are computed in float32 when it is set up


def levels_of(scheduler, schedule):
    """sigma_t / alpha_t at every stop."""
    if isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        return np.unique(scheduler.sigmas.numpy().astype(np.float64))[::-1]
    stops = sorted({int(t) for t in scheduler._timesteps}, reverse=True)  # PNDM: its own list has calls between stops
    return np.append(schedule.sigma_ve(np.array(stops)), 0.0)


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("case", CASES)
def test_follows_diffusers(case, steps, record_property, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    kind, config, name, options = CASES[case]
    made_for = getattr(diffusers, kind + "Scheduler")
    scheduler = made_for(**{**SD, **config})
    scheduler.set_timesteps(steps)
    bar = scheduler.alphas_cumprod.numpy().astype(np.float64)
    schedule = VP(1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]]))
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        scheduler.sigmas = scheduler.sigmas.double()
    levels, noises, draws = levels_of(scheduler, schedule), Noises(), iter(range(1000))
    assert len(levels) == steps + 1
    if name == "deis":
        options = {**options, "lower_order_final": steps < 15}
    if name == "sa_solver":  # stochastic from timestep 200 to 800
        options = {**options, "s_tmin": float(schedule.sigma_ve(199.5)), "s_tmax": float(schedule.sigma_ve(800.5))}
    prediction = {"v_prediction": "v"}.get(config.get("prediction_type"), "epsilon")
    made = plan(name, schedule=schedule, sigmas=levels, prediction=prediction, start="latent", **options)
    start = np.float64(noises[Noise("init", 0)])

    module = __import__(made_for.__module__, fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor",
                            lambda *_, **__: torch.from_numpy(np.float64(noises[Noise("step", next(draws))])))
    seen, sigmas = [], iter(made.sigmas[made.calls_model])
    latents = torch.from_numpy(start)
    latents = latents * float(np.hypot(1, levels[0])) if kind in VE_STATE else latents
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, t).numpy()
        sigma = next(sigmas)
        seen.append(given)
        out = torch.from_numpy(predict(prediction, given, sigma, float(schedule.alpha_at(sigma))))
        latents = scheduler.step(out, t, latents, return_dict=False)[0]
    end = latents.numpy() * (float(schedule.alpha_at(levels[-1])) if kind in VE_STATE else 1.0)

    trace = []
    ours = run(made, lambda x, s, _: predict(prediction, x, s, float(schedule.alpha_at(s))), noises, start=start, trace=trace)
    errors = [relative(mine, theirs) for (_, _, mine, _), theirs in zip(trace, seen, strict=True)] + [relative(ours, end)]
    record_property("relative_error", max(errors))
    assert max(errors) < TOLERANCE.get(case, 1e-8), f"call {np.argmax(errors)}: {max(errors):.3g}"
