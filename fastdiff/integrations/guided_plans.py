"""What a GaussianDiffusion of OpenAI's says, and its loops as rows."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ..plan import Plan, plan
from ..samplers.stage import Noise
from ..schedules import VP

__all__ = ["Diffusion", "Tables", "plan_of", "read", "tables"]

MEANS = {"EPSILON": "epsilon", "START_X": "sample"}
VARIANCES = ("FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE")


class Diffusion(NamedTuple):
    """mean: the plan's prediction; variance: the type's name; betas: (T,) float64, as bytes; times: (T,), what the model is given
    for each t; whole: as int64, else as float32."""

    mean: str
    variance: str
    betas: bytes
    times: tuple[float, ...]
    whole: bool


def read(diffusion) -> Diffusion:
    missing = [name for name in ("betas", "model_mean_type", "model_var_type") if not hasattr(diffusion, name)]
    if missing:
        raise TypeError(f"diffusion is {type(diffusion).__name__}, without {', '.join(missing)}: a GaussianDiffusion is taken")
    mean, variance = (getattr(kind, "name", str(kind)) for kind in (diffusion.model_mean_type, diffusion.model_var_type))
    if mean not in MEANS:
        raise ValueError(f"model_mean_type is {mean}: EPSILON or START_X is taken; for PREVIOUS_X the class's own loop serves")
    if variance not in VARIANCES:
        raise ValueError(f"model_var_type is {variance}: {', '.join(VARIANCES)} is taken")
    try:
        betas = np.asarray(diffusion.betas, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"betas is {diffusion.betas!r}: numbers (T,) are taken") from None
    times = torch.as_tensor(getattr(diffusion, "timestep_map", range(len(betas))), device="cpu")
    if len(times) != len(betas):
        raise ValueError(f"timestep_map has {len(times)} entries, betas has {len(betas)}: one for each timestep is taken")
    scaled = bool(getattr(diffusion, "rescale_timesteps", False))
    if scaled:
        times = times.float() * (1000.0 / getattr(diffusion, "original_num_steps", len(betas)))
    return Diffusion(MEANS[mean], variance, betas.tobytes(), tuple(times.tolist()), not scaled)


class Tables(NamedTuple):
    """By t: abar_t; the fixed variance of p(x_{t-1} | x_t); and of a learned one, e^b and a with sqrt(Sigma) = e^b e^(a v)."""

    abar: np.ndarray
    variance: np.ndarray
    spread: np.ndarray
    rate: np.ndarray


@functools.lru_cache(maxsize=8)
def tables(betas: bytes, variance: str) -> Tables:
    """LEARNED: v = ln Sigma. LEARNED_RANGE: ln Sigma = f ln beta + (1 - f) ln beta~, f = (v + 1) / 2 (Nichol & Dhariwal 2021,
    eq. 15), where beta~_t = beta_t (1 - abar_{t-1}) / (1 - abar_t), and at t = 0, where that is 0, its neighbour."""
    beta = np.frombuffer(betas)
    abar = np.cumprod(1 - beta)
    posterior = beta * (1 - np.append(1.0, abar[:-1])) / (1 - abar)
    clipped = np.append(posterior[1], posterior[1:])
    fixed = np.append(posterior[1], beta[1:]) if variance == "FIXED_LARGE" else posterior
    if variance == "LEARNED_RANGE":
        return Tables(abar, fixed, (beta * clipped) ** 0.25, np.log(beta / clipped) / 4)
    return Tables(abar, fixed, np.ones_like(beta), np.full_like(beta, 0.5))


@functools.lru_cache(maxsize=16)
def plan_of(betas: bytes, times: tuple, prediction: str, variance: str, sampler: str, clip: bool, eta: float) -> Plan:
    """The loop as rows; without noise where its variance is learned: see `guided_diffusion._Beside`."""
    schedule, T = VP(np.frombuffer(betas), "guided_diffusion"), len(betas) // 8
    options = {"eta": eta} if sampler == "ddim" else {"variance": "fixed_large" if variance == "FIXED_LARGE" else "fixed_small"}
    made = plan(sampler, schedule=schedule, timesteps=np.arange(T)[::-1], prediction=prediction, start="latent",
                clip_denoised=(-1.0, 1.0) if clip else None, **options)
    rows = [replace(row, time=float(time)) for row, time in zip(made.rows[1:], reversed(times))]  # row 0 only copies the start
    if sampler == "ddpm" and variance.startswith("LEARNED"):
        rows = [replace(row, y=({s: c for s, c in row.y[0].items() if not isinstance(s, Noise)},)) for row in rows]
    return Plan.from_rows(rows, inputs=made.inputs, outputs=made.outputs, name=sampler, info=made.info)
