"""Fused schedulers against the sums that diffusers' own tests publish for whole runs.

The numbers are those of tests/schedulers in huggingface/diffusers at 58eb52c0803ea9af3abec60841c2a093bdf1f951, on the CPU: the
sum and the mean of |x| after a run on ordered numbers in [0, 1), with x t / (t + 1) as the network.
"""

import inspect
from dataclasses import dataclass, field

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import fastdiff as fd
import fastdiff.integrations.diffusers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SHAPE = (4, 3, 8, 8)
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
LONGER = {**LINEAR, "num_train_timesteps": 1100}
MULTISTEP = {**LINEAR, "lower_order_final": False, "euler_at_final": False, "final_sigmas_type": "sigma_min"}
INVERSE = {**LINEAR, "lower_order_final": False}
SINGLE = {**LINEAR, "final_sigmas_type": "sigma_min"}
EDM = {"lower_order_final": False, "euler_at_final": False, "final_sigmas_type": "sigma_min", "prediction_type": "epsilon"}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
CONSISTENCY = {"num_train_timesteps": 201}
ONE_STEP = {"num_inference_steps": 1}
SEED = {"noise_sampler_seed": 0}
KARRAS = {"use_karras_sigmas": True}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5}
REALLY_ONE, NOT_ONE = {"beta_start": 0.01, "set_alpha_to_one": True}, {"beta_start": 0.01, "set_alpha_to_one": False}


@dataclass(frozen=True)
class Loop:
    """total, mean: of |x|, None where none is published. steps: arguments of set_timesteps, None: the scheduler's first
    timesteps. start: noise is added for this step, which is the first. skip: the first step, where none is added. scaling:
    "model" is handed what scale_model_input gives, "step" is handed it too, or "none". twice: the run is repeated from where it
    came to, with the step counter put back."""

    name: str
    config: dict
    total: float | None
    mean: float | None
    steps: dict | None = field(default_factory=lambda: {"num_inference_steps": 10})
    start: int | None = None
    scaling: str = "step"
    twice: bool = False
    needs: str | None = None
    shape: tuple = SHAPE
    skip: int = 0

    def __str__(self):
        named = ("prediction_type", "use_karras_sigmas", "thresholding", "beta_start")
        options = [f"{k}={v}" for k, v in self.config.items() if k in named]
        return " ".join([self.name, *options, f"from {self.start or self.skip}"])


LOOPS = [
    Loop("DDIMScheduler", LINEAR, 172.0067, 0.223967),
    Loop("DDIMScheduler", {**LINEAR, **V}, 52.5302, 0.0684),
    Loop("DDIMScheduler", {**LINEAR, **REALLY_ONE}, 149.8295, 0.1951),
    Loop("DDIMScheduler", {**LINEAR, **NOT_ONE}, 149.0784, 0.1941),
    Loop("DDIMScheduler", LINEAR, 354.5418, 0.4616, start=8),
    Loop("DDIMParallelScheduler", LINEAR, 172.0067, 0.223967),
    Loop("DDIMParallelScheduler", {**LINEAR, **V}, 52.5302, 0.0684),
    Loop("DDIMParallelScheduler", LINEAR, 354.5418, 0.4616, start=8),
    Loop("DDIMInverseScheduler", LINEAR, 671.6816, 0.8746),
    Loop("DDIMInverseScheduler", {**LINEAR, **V}, 1394.2185, 1.8154),
    Loop("DDIMInverseScheduler", {**LINEAR, **REALLY_ONE}, 539.9622, 0.7031),
    Loop("DDIMInverseScheduler", {**LINEAR, **NOT_ONE}, 542.6722, 0.7066),
    Loop("DDPMScheduler", LINEAR, 258.9606, 0.3372, steps=None),
    Loop("DDPMScheduler", {**LINEAR, **V}, 202.0296, 0.2631, steps=None),
    Loop("DDPMScheduler", LINEAR, 387.9466, 0.5051, steps=None, start=998),
    Loop("DDPMParallelScheduler", LINEAR, 387.9466, 0.5051, steps=None, start=998),
    Loop("PNDMScheduler", LINEAR, 198.1318, 0.2580),
    Loop("PNDMScheduler", {**LINEAR, **V}, 67.3986, 0.0878),
    Loop("PNDMScheduler", {**LINEAR, **REALLY_ONE}, 230.0399, 0.2995),
    Loop("PNDMScheduler", {**LINEAR, **NOT_ONE}, 186.9482, 0.2434),
    Loop("EulerDiscreteScheduler", LONGER, 10.0807, 0.0131),
    Loop("EulerDiscreteScheduler", {**LONGER, **V}, 0.0002, 2.2676e-06),
    Loop("EulerDiscreteScheduler", {**LONGER, **KARRAS}, 124.52299499511719, 0.16213932633399963),
    Loop("EulerDiscreteScheduler", LONGER, 57062.9297, 74.3007, start=8),
    Loop("EulerAncestralDiscreteScheduler", LONGER, 152.3192, 0.1983),
    Loop("EulerAncestralDiscreteScheduler", {**LONGER, **V}, 108.4439, 0.1412),
    Loop("EulerAncestralDiscreteScheduler", LONGER, 56163.0508, 73.1290, start=8),
    Loop("HeunDiscreteScheduler", LONGER, 0.1233, 0.0002),
    Loop("HeunDiscreteScheduler", {**LONGER, **V}, 4.6934e-07, 6.1112e-10),
    Loop("HeunDiscreteScheduler", {**LONGER, **KARRAS}, 0.00015, 1.9869554535034695e-07),
    Loop("HeunDiscreteScheduler", LONGER, 75074.8906, 97.7538, start=8),
    Loop("KDPM2DiscreteScheduler", LONGER, 20.4125, 0.0266),
    Loop("KDPM2DiscreteScheduler", {**LONGER, **V}, 4.6934e-07, 6.1112e-10),
    Loop("KDPM2DiscreteScheduler", LONGER, 70408.4062, 91.6776, start=8),
    Loop("KDPM2AncestralDiscreteScheduler", LONGER, 13979.9433, 18.2030),
    Loop("KDPM2AncestralDiscreteScheduler", {**LONGER, **V}, 331.8133, 0.4320),
    Loop("KDPM2AncestralDiscreteScheduler", LONGER, 93087.3437, 121.2074, start=8),
    Loop("LMSDiscreteScheduler", LONGER, 1006.388, 1.31),
    Loop("LMSDiscreteScheduler", {**LONGER, **V}, 0.0017, 2.2676e-06),
    Loop("LMSDiscreteScheduler", {**LONGER, **KARRAS}, 3812.9927, 4.9648),
    Loop("LMSDiscreteScheduler", LONGER, 27663.6895, 36.0204, start=8),
    Loop("DPMSolverMultistepScheduler", MULTISTEP, None, 0.3301),
    Loop("DPMSolverMultistepScheduler", MULTISTEP, 318.4111, 0.4146, start=5),
    Loop("DPMSolverMultistepScheduler", {**MULTISTEP, **THRESHOLD}, None, 1.1364),
    Loop("DPMSolverMultistepScheduler", {**MULTISTEP, **V}, None, 0.2251),
    Loop("DPMSolverMultistepScheduler", {**MULTISTEP, **V, **KARRAS}, None, 0.2096),
    Loop("DPMSolverMultistepScheduler", {**MULTISTEP, **V, "use_lu_lambdas": True}, None, 0.1554),
    Loop("DPMSolverMultistepInverseScheduler", INVERSE, None, 0.7047),
    Loop("DPMSolverMultistepInverseScheduler", {**INVERSE, **THRESHOLD}, None, 19.8933),
    Loop("DPMSolverMultistepInverseScheduler", {**INVERSE, **V}, None, 1.5194),
    Loop("DPMSolverSinglestepScheduler", SINGLE, None, 0.2791),
    Loop("DPMSolverSinglestepScheduler", {**SINGLE, **KARRAS}, None, 0.2248),
    Loop("DPMSolverSinglestepScheduler", {**SINGLE, **V}, None, 0.1453),
    Loop("DPMSolverSinglestepScheduler", {**SINGLE, **V, **KARRAS}, None, 0.0649),
    Loop("DPMSolverSinglestepScheduler", SINGLE, 269.2187, 0.3505, start=5),
    Loop("DPMSolverSinglestepScheduler", SINGLE, None, 0.2574, steps={"num_inference_steps": 50}, skip=3),
    Loop("DPMSolverSDEScheduler", {**LONGER, **SEED}, 162.52383422851562, 0.211619570851326, needs="torchsde"),
    Loop("DPMSolverSDEScheduler", {**LONGER, **V, **SEED}, 119.8487548828125, 0.1560530662536621, needs="torchsde"),
    Loop("DEISMultistepScheduler", LINEAR, None, 0.23916),
    Loop("DEISMultistepScheduler", {**LINEAR, **V}, None, 0.091),
    Loop("DEISMultistepScheduler", LINEAR, 315.3016, 0.41054, start=8),
    Loop("UniPCMultistepScheduler", SINGLE, None, 0.2464),
    Loop("UniPCMultistepScheduler", {**SINGLE, **KARRAS}, None, 0.2925),
    Loop("UniPCMultistepScheduler", {**SINGLE, **V}, None, 0.1014),
    Loop("UniPCMultistepScheduler", {**SINGLE, **V, **KARRAS}, None, 0.1966),
    Loop("UniPCMultistepScheduler", SINGLE, 315.5757, 0.4109, start=8),
    Loop("UniPCMultistepScheduler", SINGLE, None, 0.2441, shape=(4, 3, 8)),
    Loop("UniPCMultistepScheduler", {**SINGLE, **V, **KARRAS}, None, 0.1944, shape=(4, 3, 8)),
    Loop("UniPCMultistepScheduler", SINGLE, 39.0870, 0.4072, start=8, shape=(4, 3, 8)),
    Loop("SASolverScheduler", LONGER, 337.394287109375, 0.43931546807289124),
    Loop("SASolverScheduler", {**LONGER, **V}, 193.1467742919922, 0.2514931857585907),
    Loop("SASolverScheduler", {**LONGER, **KARRAS}, 837.2554931640625, 1.0901764631271362),
    Loop("EDMEulerScheduler", {"num_train_timesteps": 256}, 34.1855, 0.044, scaling="model"),
    Loop("EDMDPMSolverMultistepScheduler", EDM, None, 0.0001, scaling="none"),
    Loop("EDMDPMSolverMultistepScheduler", EDM, 8.1661, 0.0106, start=5, scaling="none"),
    Loop("EDMDPMSolverMultistepScheduler", {**EDM, **THRESHOLD}, None, 0.0080, scaling="none"),
    Loop("EDMDPMSolverMultistepScheduler", {**EDM, **V}, None, 0.0092, scaling="none"),
    Loop("LCMScheduler", LATENT, 18.7097, 0.0244, steps=ONE_STEP),
    Loop("LCMScheduler", LATENT, 197.7616, 0.2575),
    Loop("TCDScheduler", LATENT, 29.8715, 0.0389, steps=ONE_STEP),
    Loop("TCDScheduler", LATENT, 181.2040, 0.2359),
    Loop("UnCLIPScheduler", {}, 252.2682495, 0.3284743, steps=None),
    Loop("UnCLIPScheduler", {}, 258.2044983, 0.3362038, steps={"num_inference_steps": 25}),
    Loop("IPNDMScheduler", {}, None, 2540529, twice=True),
    Loop("CMStochasticIterativeScheduler", CONSISTENCY, 192.7614, 0.2510, steps=ONE_STEP, scaling="model"),
    Loop("CMStochasticIterativeScheduler", CONSISTENCY, 347.6357, 0.4527, steps={"timesteps": [106, 0]}, scaling="model"),
    Loop("CMStochasticIterativeScheduler", CONSISTENCY, 763.9186, 0.9947, start=8, scaling="model"),
]  # fmt: skip


def ordered(shape, backwards=False):
    """0, 1/n, 2/n, ... running over the batch first; backwards: from the other end."""
    count = torch.Size(shape).numel()
    numbers = torch.arange(count)
    numbers = (numbers.flip(-1) if backwards else numbers).reshape(*shape[1:], shape[0]) / count
    return numbers.movedim(-1, 0)


def ran(scheduler, loop):
    if loop.steps is not None:
        scheduler.set_timesteps(**loop.steps)
    generator = torch.manual_seed(0)
    x = ordered(loop.shape) if loop.scaling == "none" else ordered(loop.shape) * getattr(scheduler, "init_noise_sigma", 1.0)
    timesteps = scheduler.timesteps[(loop.start or loop.skip) * getattr(scheduler, "order", 1) :]
    if loop.start is not None:
        x = scheduler.add_noise(x, ordered(loop.shape, backwards=True), timesteps[:1])
    takes = inspect.signature(scheduler.step).parameters
    for _ in range(2 if loop.twice else 1):
        for i, t in enumerate(timesteps):
            options = {"generator": generator} if "generator" in takes else {}
            if "prev_timestep" in takes and loop.steps is not None:
                options["prev_timestep"] = timesteps[i + 1] if i + 1 < len(timesteps) else None
            if loop.name == "TCDScheduler":
                options["eta"] = 0.0
            inside = x if loop.scaling == "none" else scheduler.scale_model_input(x, t)
            output = inside * t / (t + 1)
            x = scheduler.step(output, t, inside if loop.scaling == "step" else x, **options).prev_sample
        if loop.twice:
            scheduler._step_index = None
    return x


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_a_run_has_the_published_sum_and_mean(loop):
    if loop.needs:
        pytest.importorskip(loop.needs, reason=f"{loop.needs} is not installed")
    make = getattr(diffusers, loop.name)
    fused = ran(fd.integrations.diffusers.fuse(make(**loop.config)), loop).abs()
    own = ran(make(**loop.config), loop).abs()
    if loop.total is not None:
        assert abs(float(fused.sum()) - loop.total) < max(1e-2, 1e-6 * loop.total)
    assert abs(float(fused.mean()) - loop.mean) < max(1e-3, 4e-6 * loop.mean)
    assert abs(float(fused.double().sum() / own.double().sum()) - 1) < 1e-4
