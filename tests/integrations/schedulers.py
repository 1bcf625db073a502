"""diffusers' schedulers, one entry a configuration, and a loop that runs any of them as a pipeline would."""

import inspect
import warnings
from dataclasses import dataclass, field

import pytest
import torch

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Config:
    """name: of the class; config: of its instance; steps: keyword arguments of set_timesteps; step: of step;
    fused: whether every step is a row of the op."""

    name: str
    config: dict = field(default_factory=dict)
    step: dict = field(default_factory=dict)
    steps: dict = field(default_factory=dict)
    fused: bool = True

    def make(self):
        import diffusers

        return getattr(diffusers, self.name)(**self.config)


def _sd(name, step=None, fused=True, **config):
    return Config(name, {**SD, **config}, step or {}, fused=fused)


FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
CHURN = {"s_churn": 2.0, "s_tmin": 0.05, "s_noise": 1.003}

CONFIGS = {
    "ddpm": _sd("DDPMScheduler", clip_sample=False),
    "ddpm large variance": _sd("DDPMScheduler", clip_sample=False, variance_type="fixed_large"),
    "ddpm v": _sd("DDPMScheduler", clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"),
    "ddpm clip": _sd("DDPMScheduler", clip_sample=True),
    "ddpm threshold": _sd("DDPMScheduler", clip_sample=False, thresholding=True),
    "ddpm parallel": _sd("DDPMParallelScheduler", clip_sample=False),
    "ddim": _sd("DDIMScheduler", clip_sample=False),
    "ddim eta": _sd("DDIMScheduler", {"eta": 1.0}, clip_sample=False),
    "ddim v": _sd("DDIMScheduler", clip_sample=False, prediction_type="v_prediction"),
    "ddim zero snr": _sd(
        "DDIMScheduler",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "ddim clip": _sd("DDIMScheduler", clip_sample=True, clip_sample_range=0.8),
    "ddim clip, clipped noise": _sd("DDIMScheduler", {"use_clipped_model_output": True, "eta": 0.5}, clip_sample=True),
    "ddim threshold": _sd("DDIMScheduler", clip_sample=False, thresholding=True),
    "ddim parallel": _sd("DDIMParallelScheduler", clip_sample=False),
    "ddim inverse": _sd("DDIMInverseScheduler", clip_sample=False),
    "cogvideox ddim": Config("CogVideoXDDIMScheduler"),
    "cogvideox dpm": Config("CogVideoXDPMScheduler"),
    "pndm": _sd("PNDMScheduler"),
    "pndm plms": _sd("PNDMScheduler", skip_prk_steps=True),
    "euler": _sd("EulerDiscreteScheduler"),
    "euler v": _sd("EulerDiscreteScheduler", prediction_type="v_prediction", timestep_spacing="trailing"),
    "euler karras": _sd("EulerDiscreteScheduler", use_karras_sigmas=True),
    "euler churn": _sd("EulerDiscreteScheduler", CHURN),
    "euler ancestral": _sd("EulerAncestralDiscreteScheduler"),
    "heun": _sd("HeunDiscreteScheduler"),
    "heun clip": _sd("HeunDiscreteScheduler", clip_sample=True),
    "kdpm2": _sd("KDPM2DiscreteScheduler"),
    "kdpm2 ancestral": _sd("KDPM2AncestralDiscreteScheduler"),
    "lms": _sd("LMSDiscreteScheduler"),
    "dpm++ 1": _sd("DPMSolverMultistepScheduler", solver_order=1),
    "dpm++ 2m": _sd("DPMSolverMultistepScheduler"),
    "dpm++ 2m karras": _sd("DPMSolverMultistepScheduler", use_karras_sigmas=True, euler_at_final=True),
    "dpm++ 3m": _sd("DPMSolverMultistepScheduler", solver_order=3),
    "dpm 2m": _sd("DPMSolverMultistepScheduler", algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "dpm++ 2m sde": _sd("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    "dpm++ 3m sde": _sd("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=3),
    "dpm++ threshold": _sd("DPMSolverMultistepScheduler", thresholding=True),
    "dpm++ flow": Config("DPMSolverMultistepScheduler", FLOW_SIGMAS),
    "dpm++ inverse": _sd("DPMSolverMultistepInverseScheduler"),
    "dpm single 2": _sd("DPMSolverSinglestepScheduler", solver_order=2),
    "dpm single 3": _sd("DPMSolverSinglestepScheduler", solver_order=3),
    "dpm++ sde": _sd("DPMSolverSDEScheduler", noise_sampler_seed=3),
    "cosine dpm": Config("CosineDPMSolverMultistepScheduler"),
    "deis 2": _sd("DEISMultistepScheduler"),
    "deis 3": _sd("DEISMultistepScheduler", solver_order=3),
    "unipc bh2": _sd("UniPCMultistepScheduler"),
    "unipc bh1": _sd("UniPCMultistepScheduler", solver_type="bh1", final_sigmas_type="sigma_min"),
    "unipc 3": _sd("UniPCMultistepScheduler", solver_order=3),
    "unipc flow": Config("UniPCMultistepScheduler", FLOW_SIGMAS),
    "sa solver": _sd("SASolverScheduler"),
    "edm euler": Config("EDMEulerScheduler"),
    "edm euler churn": Config("EDMEulerScheduler", step=CHURN),
    "edm dpm++ 2m": Config("EDMDPMSolverMultistepScheduler"),
    "edm dpm++ 2m sde": Config("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "flow euler": Config("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow euler shifting": Config("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, steps={"mu": 1.15}),
    "flow euler stochastic": Config("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "flow heun": Config("FlowMatchHeunDiscreteScheduler"),
    "flow lcm": Config("FlowMatchLCMScheduler"),
    "ltx euler ancestral": Config("LTXEulerAncestralRFScheduler"),
    "lcm": Config("LCMScheduler"),
    "lcm clip": Config("LCMScheduler", {"clip_sample": True}),
    "tcd": Config("TCDScheduler"),
    "scm": Config("SCMScheduler", steps={"intermediate_timesteps": None}),
    "consistency": Config("CMStochasticIterativeScheduler", {"clip_denoised": False}),
    "consistency clip": Config("CMStochasticIterativeScheduler"),
    "ipndm": Config("IPNDMScheduler"),
    "unclip": Config("UnCLIPScheduler"),
    "wuerstchen": Config("DDPMWuerstchenScheduler"),
    "score sde ve": Config("ScoreSdeVeScheduler"),
    "ddpm learned": _sd("DDPMScheduler", variance_type="learned_range", clip_sample=False, fused=False),
    "repaint": Config("RePaintScheduler", fused=False),
}


def model(x, t, channels=None):
    """A network in closed form: bounded, smooth, not linear; `channels` of output."""
    out = (torch.tanh(x.float()) * 0.7 + 0.1 * x.float()).to(x.dtype)
    return out if channels is None else torch.cat([out, torch.tanh(out)], 1)


def latents(shape, dtype, generator):
    return torch.randn(shape, generator=generator).to(dtype)


def sample(
    scheduler,
    config: Config,
    *,
    steps=20,
    shape=(2, 3, 6, 6),
    dtype=torch.float32,
    generator=None,
    start=0,
    x=None,
    outputs=None,
):
    """The last latents; outputs: a list that takes what each step returned."""
    generator = torch.Generator().manual_seed(7) if generator is None else generator
    if config.name == "RePaintScheduler":
        scheduler.set_timesteps(steps, jump_length=4, jump_n_sample=2)
    else:
        scheduler.set_timesteps(steps, **config.steps)
    if config.name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(steps)
    order = getattr(scheduler, "order", 1)
    timesteps = scheduler.timesteps[start * order :]
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * order)
    if x is None:
        drawn = generator if not isinstance(generator, list) else generator[0]
        x = latents(shape, dtype, drawn) * min(float(getattr(scheduler, "init_noise_sigma", 1.0)), 80.0)
    if config.name in ("DDPMWuerstchenScheduler", "SCMScheduler"):
        timesteps = timesteps[:-1]  # the last one is where the last step leads
    step = getattr(scheduler, "step", None) or scheduler.step_pred
    parameters = inspect.signature(step).parameters
    options = dict(config.step)
    if "generator" in parameters:
        options["generator"] = generator
    if config.name == "RePaintScheduler":
        mask = (torch.arange(x.shape[-1]) > 2).to(x.dtype).expand(x.shape)
        options.update(original_image=torch.full_like(x, 0.3), mask=mask)
    before, learned = None, config.config.get("variance_type") == "learned_range"
    for i, t in enumerate(timesteps):
        if config.name == "RePaintScheduler" and i and t > timesteps[i - 1]:
            x = scheduler.undo_step(x, timesteps[i - 1], generator)
            continue
        if config.name == "DDPMWuerstchenScheduler":
            t = t.expand(len(x))
        inside = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = model(inside, t, 2 if learned else None)
        if config.name == "CogVideoXDPMScheduler":
            result = scheduler.step(output, before, t, timesteps[i - 1] if i else None, x, return_dict=False, **options)
            before = result[1]
        else:
            result = step(output, t, x, return_dict=False, **options)
        if outputs is not None:
            outputs.append(result)
        x = result[0]
    return x


BROWNIAN = {"dpm++ sde", "cosine dpm"}


def made(name):
    if name in BROWNIAN:
        pytest.importorskip("torchsde", reason="torchsde is not installed")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    if not hasattr(diffusers, CONFIGS[name].name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {CONFIGS[name].name}")
    return CONFIGS[name].make()


def fused_only():
    """A step that is not fused fails the test."""
    context = warnings.catch_warnings()
    context.__enter__()
    warnings.filterwarnings("error", message=".*the scheduler's own step is used.*")
    return context


def relative(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
