"""Each sampler follows k-diffusion and diffusers: same model outputs, same noise, 50 steps.

Twice each: in float64 on both sides, where the formulas must be the same, and in float32 on both sides (ours by the
exact reference of the kernels), where only rounding differs. Compared are the base before every step and the end.
"""

import numpy as np
import pytest
import torch
from plan.harness import Noises, denoise, k_diffusion, predict, relative, run
from plan.solvers import diffusers_3m_sde

from fastdiff.plan import plan
from fastdiff.reference import EXACT, FLOAT64
from fastdiff.samplers.stage import Noise
from fastdiff.schedules import EDM, VP, Flow

STEPS = 50
PRECISIONS = {"float64": (FLOAT64, torch.float64, 2e-9), "float32": (EXACT, torch.float32, 1e-5)}


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(params=PRECISIONS)
def precision(request):
    return PRECISIONS[request.param]


def bases(made, model, noises, arithmetic, start, seen=False):
    """The base (or with `seen` the model's input) before the first row of each step, and the last base."""
    trace = []
    end = run(made, model, noises, start=start, arithmetic=arithmetic, trace=trace)
    first = {int(made.steps[r]): points[seen] for r, *points, _ in reversed(trace)}
    return [first[i] for i in sorted(first)] + [end]


def compare(ours, theirs, tolerance, record):
    assert len(ours) == len(theirs)
    errors = [relative(a, b) for a, b in zip(ours, theirs)]
    record("relative_error", float(np.max(errors)))
    assert np.max(errors) < tolerance, f"step {np.argmax(errors)}: {np.max(errors):.3g}"


def independent(noises):
    """A noise sampler: each query is the next draw."""
    draws = iter(range(10 * STEPS))
    return lambda s, s_next: noises[Noise("step", next(draws))]


def brownian(noises):
    """A noise sampler with the law of k-diffusion's BrownianTreeNoiseSampler for two queries a step from one sigma, in
    terms of our draws: the increment over the longer interval holds the one over the shorter."""
    state = {"s": None, "i": -1}

    def query(s, s_next):
        if s != state["s"]:
            state.update(s=s, inner=s_next, i=state["i"] + 1)
            return noises[Noise("step", 2 * state["i"])]
        shared = (s - state["inner"]) / (s - s_next)
        first, second = (np.float64(noises[Noise("step", 2 * state["i"] + k)]) for k in (0, 1))
        return np.sqrt(shared) * first + np.sqrt(1 - shared) * second

    return query


# ---- k-diffusion: sigma from 80 to 0.02, then 0; noise from our addresses

CHURN = {"s_churn": 30.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.007}
K_DIFFUSION = {
    "euler": ("euler", {}),
    "euler with churn": ("euler", CHURN),
    "heun": ("heun", {}),
    "heun with churn": ("heun", CHURN),
    "dpm_2": ("dpm_2", {}),
    "dpm_2 with churn": ("dpm_2", CHURN),
    "euler_ancestral": ("euler_ancestral", {}),
    "euler_ancestral, eta 0.7": ("euler_ancestral", {"eta": 0.7, "s_noise": 0.95}),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}),
    "dpmpp_2s_ancestral, eta 0": ("dpmpp_2s_ancestral", {"eta": 0.0}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
    "dpmpp_2m_sde heun": ("dpmpp_2m_sde", {"solver_type": "heun", "eta": 0.6, "s_noise": 0.9}),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}),
    "dpmpp_3m_sde, eta 0": ("dpmpp_3m_sde", {"eta": 0.0}),
    "dpmpp_sde": ("dpmpp_sde", {}),
    "dpmpp_sde, r 0.4": ("dpmpp_sde", {"r": 0.4, "eta": 0.8, "s_noise": 1.1}),
}


@pytest.mark.parametrize("case", K_DIFFUSION)
def test_follows_k_diffusion(case, precision, record_property, monkeypatch):
    name, options = K_DIFFUSION[case]
    sampling = k_diffusion()
    arithmetic, dtype, tolerance = precision
    made = plan(name, schedule=EDM(0.02, 80), steps=STEPS, prediction="denoised", start="latent", **options)
    noises = Noises()
    levels = np.append(EDM(0.02, 80).grid("karras", STEPS)[:-1], 0.0)
    start = levels[0] * np.float64(noises[Noise("init", 0)])

    def tensor(values):
        return torch.from_numpy(np.asarray(values)).to(dtype)

    query = brownian(noises) if name == "dpmpp_sde" else independent(noises)
    theirs = []
    churned = iter(range(STEPS))
    monkeypatch.setattr(sampling.torch, "randn_like", lambda x: tensor(noises[Noise("churn", next(churned))]))
    extra = {}
    if name not in ("euler", "heun", "dpm_2", "dpmpp_2m"):
        extra["noise_sampler"] = lambda s, s_next: tensor(query(float(s), float(s_next)))
    end = getattr(sampling, f"sample_{name}")(
        lambda x, sigma: tensor(denoise(x.numpy(), sigma[0])),
        tensor(start),
        tensor(levels),
        disable=True,
        callback=lambda info: theirs.append(info["x"].numpy()),
        **options,
        **extra,
    )
    ours = bases(made, lambda x, sigma, _: denoise(x, sigma), noises, arithmetic, start)
    compare(ours, [*theirs, end.numpy()], tolerance, record_property)


# ---- diffusers: in float32, from the levels and timesteps that its scheduler chose

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP_STATE, VE_STATE, FLOW_STATE, EDM_STATE = "vp", "ve", "flow", "edm"
# case: (scheduler, its options, what its latents are, our sampler, our options, prediction)
DIFFUSERS = {
    "DDIM": ("DDIM", {"clip_sample": False, "timestep_spacing": "trailing"}, VP_STATE, "ddim", {}, "epsilon"),
    "DDIM eta 0.7, v": (
        "DDIM",
        {"clip_sample": False, "prediction_type": "v_prediction"},
        VP_STATE,
        "ddim",
        {"eta": 0.7},
        "v",
    ),
    "DDIM clipped": (
        "DDIM",
        {"clip_sample": True, "clip_sample_range": 0.8},
        VP_STATE,
        "ddim",
        {"use_clipped_model_output": False, "clip_denoised": (-0.8, 0.8)},
        "epsilon",
    ),
    "DDPM": ("DDPM", {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}, VP_STATE, "ddpm", {}, "epsilon"),
    "DDPM clipped, x0": (
        "DDPM",
        {"clip_sample_range": 0.8, "prediction_type": "sample"},
        VP_STATE,
        "ddpm",
        {"clip_denoised": (-0.8, 0.8)},
        "sample",
    ),
    "DDPM fixed_large": (
        "DDPM",
        {"clip_sample": False, "variance_type": "fixed_large"},
        VP_STATE,
        "ddpm",
        {"variance": "fixed_large"},
        "epsilon",
    ),
    "Euler": ("EulerDiscrete", {}, VE_STATE, "euler", {}, "epsilon"),
    "Euler karras, v": (
        "EulerDiscrete",
        {"use_karras_sigmas": True, "prediction_type": "v_prediction"},
        VE_STATE,
        "euler",
        {},
        "v",
    ),
    "EulerAncestral": ("EulerAncestralDiscrete", {}, VE_STATE, "euler_ancestral", {}, "epsilon"),
    "Heun": ("HeunDiscrete", {"use_karras_sigmas": True}, VE_STATE, "heun", {}, "epsilon"),
    "KDPM2": ("KDPM2Discrete", {"use_karras_sigmas": True}, VE_STATE, "dpm_2", {}, "epsilon"),
    "DPM++ 2M": ("DPMSolverMultistep", {"use_karras_sigmas": True}, VP_STATE, "dpmpp_2m", {}, "epsilon"),
    "DPM++ 2M heun, v": (
        "DPMSolverMultistep",
        {"solver_type": "heun", "prediction_type": "v_prediction"},
        VP_STATE,
        "dpmpp_2m",
        {"solver_type": "heun"},
        "v",
    ),
    "DPM++ 3M": (
        "DPMSolverMultistep",
        {"solver_order": 3, "solver_type": "heun", "use_karras_sigmas": True},
        VP_STATE,
        "dpmpp_3m",
        {},
        "epsilon",
    ),
    "DPM++ 2M SDE": (
        "DPMSolverMultistep",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        VP_STATE,
        "dpmpp_2m_sde",
        {},
        "epsilon",
    ),
    "DPM++ 2M SDE heun": (
        "DPMSolverMultistep",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        VP_STATE,
        "dpmpp_2m_sde",
        {"solver_type": "heun"},
        "epsilon",
    ),
    "DPM++ 3M SDE": (
        "DPMSolverMultistep",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun", "use_karras_sigmas": True},
        VP_STATE,
        diffusers_3m_sde,
        {},
        "epsilon",
    ),
    "UniPC 2": ("UniPCMultistep", {"use_karras_sigmas": True}, VP_STATE, "unipc", {"order": 2}, "epsilon"),
    "UniPC 3, v": (
        "UniPCMultistep",
        {"solver_order": 3, "prediction_type": "v_prediction", "use_karras_sigmas": True},
        VP_STATE,
        "unipc",
        {"order": 3},
        "v",
    ),
    "SA-Solver": ("SASolver", {"use_karras_sigmas": False}, VP_STATE, "sa_solver", {}, "epsilon"),
    "SA-Solver 3, 4": (
        "SASolver",
        {"predictor_order": 3, "corrector_order": 4},
        VP_STATE,
        "sa_solver",
        {"predictor_order": 3, "corrector_order": 4},
        "epsilon",
    ),
    "DPM++ SDE": ("DPMSolverSDE", {"use_karras_sigmas": True}, VE_STATE, "dpmpp_sde", {}, "epsilon"),
    "LCM": ("LCM", {}, VP_STATE, "lcm", {"timestep_scaling": 10.0}, "epsilon"),
    "EDM Euler": ("EDMEuler", {}, EDM_STATE, "euler", {}, "edm"),
    "EDM DPM++ 2M": ("EDMDPMSolverMultistep", {}, EDM_STATE, "dpmpp_2m", {}, "edm"),
    "FlowMatchEuler": ("FlowMatchEulerDiscrete", {"shift": 3.0}, FLOW_STATE, "flow_euler", {}, "flow"),
    "FlowMatchHeun": ("FlowMatchHeunDiscrete", {"shift": 3.0}, FLOW_STATE, "flow_heun", {}, "flow"),
    "DPM++ 2M flow": (
        "DPMSolverMultistep",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        FLOW_STATE,
        "dpmpp_2m",
        {},
        "flow",
    ),
}


def peer_levels(scheduler, state, schedule):
    """sigma_ve at every stop of a diffusers scheduler."""
    if hasattr(scheduler, "sigmas"):
        levels = np.unique(scheduler.sigmas.numpy().astype(np.float64))[::-1]
        return schedule.sigma_ve(levels) if state == FLOW_STATE else levels
    return np.append(schedule.sigma_ve(scheduler.timesteps.numpy()), 0.0)


def peer_schedule(scheduler, state):
    if state in (VP_STATE, VE_STATE):  # from their float32 alpha_bar, so that both mean the same levels
        bar = scheduler.alphas_cumprod.numpy().astype(np.float64)
        return VP(1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]]))
    return Flow() if state == FLOW_STATE else EDM()


@pytest.mark.parametrize("case", DIFFUSERS)
def test_follows_diffusers(case, record_property, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    kind, config, state, name, options, prediction = DIFFUSERS[case]
    made_for = getattr(diffusers, kind + "Scheduler")
    base = SD if state in (VP_STATE, VE_STATE) else {}
    scheduler = made_for(**{**base, **config})
    scheduler.set_timesteps(STEPS)
    schedule = peer_schedule(scheduler, state)
    levels = peer_levels(scheduler, state, schedule)
    alphas = schedule.alpha_at(levels)
    noises = Noises()
    scale = levels if state == EDM_STATE else alphas * levels if state == FLOW_STATE else np.ones_like(levels)
    start = (scale[0] * noises[Noise("init", 0)]).astype(np.float32)

    if name == "sa_solver":  # its coefficients of order 4, computed in float32, are off by 1e-4; in float64 they are not
        scheduler.sigmas = scheduler.sigmas.double()
    query = brownian(noises) if name == "dpmpp_sde" else independent(noises)

    def drawn(*queried, **_):
        return torch.from_numpy(np.float32(query(*map(float, queried)) if name == "dpmpp_sde" else query(None, None)))

    module = __import__(made_for.__module__, fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", drawn)
    scheduler.noise_sampler = drawn

    latents, theirs = torch.from_numpy(start), []
    latents = latents / float(alphas[0]) if state == VE_STATE else latents
    for i, t in enumerate(scheduler.timesteps):
        second = not getattr(scheduler, "state_in_first_order", True)
        if not second:
            theirs.append(latents.numpy() * (alphas[len(theirs)] if state == VE_STATE else 1))
        sigma = levels[len(theirs) - 1]
        if second:
            middle = {
                "dpm_2": lambda: float(scheduler.sigmas_interpol[i]),
                "dpmpp_sde": lambda: np.sqrt(sigma * levels[len(theirs)]),
            }
            sigma = middle.get(name, lambda: levels[len(theirs)])()
        seen = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        if state == EDM_STATE:
            seen = latents
        out = predict(prediction, seen.numpy(), sigma, float(schedule.alpha_at(sigma)))
        extra = {"eta": options["eta"]} if name == "ddim" and "eta" in options else {}
        if state == EDM_STATE:
            scheduler.is_scale_input_called = True
        latents = scheduler.step(torch.from_numpy(out.astype(np.float32)), t, latents, return_dict=False, **extra)[0]
    theirs.append(latents.numpy())

    if name == "sa_solver":  # stochastic at timesteps from 200 to 800
        options = {**options, "s_tmin": float(schedule.sigma_ve(199.5)), "s_tmax": float(schedule.sigma_ve(800.5))}
    made = plan(name, schedule=schedule, sigmas=levels, prediction=prediction, start="latent", **options)

    def model(seen, sigma, _):
        alpha = float(schedule.alpha_at(sigma))
        seen = seen * np.hypot(sigma, 0.5) if prediction == "edm" else seen
        return predict(prediction, seen, sigma, alpha)

    compare(bases(made, model, noises, EXACT, start, seen=name in ("unipc", "sa_solver")), theirs, 1e-5, record_property)
