"""Golden cases of the samplers: stored plans, run with a model of one exactly rounded multiplication.

The tables are stored (``plans.json``), since another mathematics library may move a fresh coefficient by an ulp. So a
difference in bits is a difference of the op, never of the host.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from ..plan import Plan, plan
from ..reference.step import NEVER
from .cases import Case
from .inputs import DTYPES, Draw

__all__ = ["MADE", "Made", "model", "sampler_cases", "trajectory"]

SHAPE, SEEDS = (2, 3, 5, 7), (7, -1)


@dataclass(frozen=True)
class Made:
    """How a stored plan is made anew: ``fd.plan(sampler, steps=4, **options)``, and what is asked of it afterwards."""

    name: str
    sampler: str
    options: dict = field(default_factory=dict)
    guidance: float | None = None
    keeps_denoised: bool = False

    def fresh(self) -> Plan:
        made = plan(self.sampler, steps=4, **self.options)
        if self.guidance is not None:
            made = made.with_guidance(self.guidance)
        return made.with_denoised() if self.keeps_denoised else made


_SCHEDULES = {"vp": {"schedule": "scaled_linear"}, "edm": {"schedule": "edm"}, "flow": {"schedule": "flow"}}
_EVERYWHERE = ("euler", "euler_ancestral", "heun", "dpm_2", "ddim", "ddpm", "lcm", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m",
               "dpmpp_3m_sde", "dpmpp_2s_ancestral", "dpmpp_sde")
_VP = {"schedule": "linear", "prediction": "v"}
_OPTIONS = [  # sampler, its options
    ("euler", {**_SCHEDULES["edm"], "s_churn": 2.0, "s_noise": 1.01}),
    ("euler", {"schedule": "scaled_linear", "grid": "karras", "vp_input": True}),
    ("euler", {**_VP, "start": "image", "strength": 0.75}),
    ("euler_ancestral", {**_VP, "eta": 0.5, "s_noise": 1.1}),
    ("heun", {**_SCHEDULES["edm"], "s_churn": 2.0, "s_tmin": 0.05, "s_tmax": 50.0}),
    ("dpm_2", {**_SCHEDULES["edm"], "s_churn": 1.0}),
    ("ddim", {**_VP, "eta": 1.0, "use_clipped_model_output": False, "clip_denoised": (-1.0, 1.0)}),
    ("ddim", {**_VP, "inpaint": "d"}),
    ("ddim", {**_VP, "inpaint": "x", "eta": 0.5}),
    ("ddpm", {"schedule": "cosine", "prediction": "sample", "variance": "fixed_large"}),
    ("ddpm", {**_VP, "clip_denoised": (-1.0, 1.0)}),
    ("lcm", {**_VP, "timestep_scaling": 10.0}),
    ("dpmpp_2m", {"schedule": "edm", "prediction": "denoised", "solver_type": "heun"}),
    ("dpmpp_2m", {**_VP, "inpaint": "d"}),
    ("dpmpp_2m_sde", {**_VP, "eta": 0.5, "solver_type": "heun", "grid": "karras"}),
    ("dpmpp_3m", {**_VP, "curvature": 2.0}),
    ("dpmpp_3m_sde", {**_VP, "eta": 0.5, "start": "latent"}),
    ("dpmpp_2s_ancestral", {**_VP, "eta": 0.5}),
    ("dpmpp_sde", {**_VP, "eta": 0.5, "r": 0.25}),
    ("dpmpp_sde", {**_VP, "inpaint": "x"}),
]

_LATER = ("dpm_2_ancestral", "heunpp2", "lms", "ipndm", "deis", "pndm", "gradient_estimation", "unipc", "sa_solver",
          "dpmpp_singlestep", "dpm_fast", "res_multistep", "res_multistep_ancestral", "seeds_2", "seeds_3", "er_sde", "tcd", "scm",
          "consistency")
_LATER_OPTIONS = [
    ("lms", {**_VP, "inpaint": "d"}),
    ("pndm", {**_VP, "skip_prk": False}),
    ("unipc", {**_VP, "order": 3, "solver_type": "bh1"}),
    ("sa_solver", {**_VP, "predictor_order": 3, "corrector_order": 4, "pece": True, "grid": "karras"}),
    ("dpmpp_singlestep", {**_VP, "order": 3, "algorithm": "dpmsolver", "solver_type": "heun"}),
    ("dpm_fast", {**_VP, "eta": 1.0}),
    ("seeds_2", {**_VP, "r": 1.0, "solver_type": "phi_2"}),
    ("tcd", {**_VP, "eta": 1.0}),
]


def _named(options: dict) -> str:
    return ", ".join(f"{k}={v}" for k, v in options.items())


MADE = [
    *(Made(f"{sampler}, {kind}", sampler, options) for sampler in _EVERYWHERE for kind, options in _SCHEDULES.items()),
    *(Made(f"{sampler}, flow", sampler) for sampler in ("flow_euler", "flow_heun")),
    *(Made(f"{sampler}, {_named(options)}", sampler, options) for sampler, options in _OPTIONS),
    Made("euler, flow, guided", "euler", _SCHEDULES["flow"], guidance=4.0),
    Made("dpmpp_2m_sde, edm, guided, denoised kept", "dpmpp_2m_sde", _SCHEDULES["edm"], guidance=2.5, keeps_denoised=True),
    # after all others: which dtype and which backend a case has goes by its place
    *(Made(f"{sampler}, {kind}", sampler, options) for sampler in _LATER for kind, options in _SCHEDULES.items()),
    *(Made(f"{sampler}, {_named(options)}", sampler, options) for sampler, options in _LATER_OPTIONS),
]


def sampler_cases(plans: dict[str, Plan]) -> list[Case]:
    """Each stored plan with a float32 model and with one of 16 bits. Interpreted Triton runs every third plan once."""
    cases = []
    for i, (name, stored) in enumerate(plans.items()):
        pair = ("float32", ("float16", "bfloat16")[i // 2 % 2])
        for dtype in pair:
            interpreted = i % 3 == 1 and dtype == pair[i % 2]
            cases.append(_case(name, stored, dtype, () if interpreted else ("triton-interpreted",)))
    return cases


def model(x, count=1):
    """0.5 x: one rounding, in float32 and again to the dtype of x, which every device does alike. A guided plan's second
    output is 0.25 x."""
    outputs = tuple((x.float() * c).to(x.dtype) for c in (0.5, 0.25)[:count])
    return outputs[0] if count == 1 else outputs


def _case(name, stored, dtype, slow):
    def build():
        draw = Draw(f"sampler/{name}")
        given = {"seeds": torch.tensor(SEEDS), "init": draw.tensor(SHAPE), "known": draw.tensor(SHAPE),
                 "mask": torch.from_numpy(draw.integers(0, 3, (1, 1, *SHAPE[2:])).astype(np.float32) / np.float32(2))}
        return {k: v for k, v in given.items() if k == "seeds" or (stored.reads_start if k == "init" else stored.uses_mask)}

    return Case(f"sampler/{name}, {dtype}", "sampler", build,
                lambda ops, a, device: trajectory(ops, stored, DTYPES[dtype], device, **a), slow)


def trajectory(ops, stored, dtype, device, *, seeds, init=None, known=None, mask=None) -> dict:
    """All latents and model inputs of a run, (rows, B, ...), and what is left in the ring. The loop of ``fd.Stepper``,
    through any implementation of the ops."""
    stored = stored.with_model_dtype(dtype)
    shape = SHAPE
    buffers = {name: torch.zeros(shape, dtype=dtype if name == "in" else torch.float32, device=device)
               for name in dict.fromkeys(("x", *stored.outputs))}
    if init is not None:
        buffers["x"].copy_(init)
    ring = torch.zeros((stored.ring, *shape), device=device) if stored.ring else None
    coef, meta = (torch.from_numpy(t).to(device) for t in stored.table())
    streams, draws = (torch.from_numpy(t.copy()).to(device) for t in (stored.streams, stored.draws))
    keys = ops.run_keys(seeds, streams, draws) if stored.noises else None
    status = torch.tensor([NEVER, 0], dtype=torch.int32, device=device)
    external = [name for name in stored.inputs if name not in buffers]
    seen = {name: [] for name in dict.fromkeys(("x", stored.model_input))}
    for row, calls in enumerate(stored.calls_model.tolist()):
        outputs = model(buffers[stored.model_input], len(external)) if calls else buffers["x"]
        outputs = outputs if isinstance(outputs, tuple) else (outputs,) * len(external)
        slots = buffers | dict(zip(external, outputs))
        ops.step_([slots[name] for name in stored.inputs], [buffers[name] for name in stored.outputs], ring, coef, meta,
                  None, row, keys, None, None, None, None, None, known, mask, status)
        for name, rows in seen.items():
            rows.append(buffers[name].clone())
    left = {} if ring is None else {"ring": ring}
    return {name: torch.stack(rows) for name, rows in seen.items()} | left | {"status": status}
