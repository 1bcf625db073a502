"""At which noise level a scheduler of diffusers has its model called, found by running it on tiny tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..plan import Plan, Row
from ..schedules import PURE_NOISE
from .calls import Brownian, Signature, Watch, vector
from .probing import Node
from .state import filled

__all__ = ["Level", "levels_of", "plan_of"]


class Level(NamedTuple):
    """The point alpha x0 + sigma n that a call of the model sees, unscaled, and the denoised estimate there,
    ``of_sample`` times that point plus ``of_output`` times the model's output."""

    alpha: float
    sigma: float
    of_sample: float
    of_output: float


def levels_of(node: Node, signature: Signature) -> tuple[list[Level], tuple[float, float] | None]:
    """The level of every entry of ``timesteps``, and the bounds to which the first step clips its estimate, if it does.

    node: in the state after ``set_timesteps``. The levels are the scheduler's own: what its ``add_noise`` or ``scale_noise``
    does, and in a second stage its ``scale_model_input``. Raises ``ValueError`` for a scheduler that does not say what its
    model predicts, or at which level.
    """
    try:
        if node.levels is None:
            node.levels = _levels(node, signature)
        return node.levels
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{node.parent.__name__} cannot be steered: its noise levels were asked for, and it raised "
                         f"{type(error).__name__}: {error}") from error


def _levels(node, signature):
    shadow = object.__new__(node.parent)
    shadow.__dict__.update(filled(node.attributes, [torch.zeros(1)] * len(node.dtypes)))
    for name, value in shadow.__dict__.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "timesteps":
            shadow.__dict__[name] = value.double()
    shadow.is_scale_input_called = True
    counts = "_step_index" in shadow.__dict__  # else a level follows from its timestep
    if counts:
        shadow._begin_index, shadow._step_index = 0, None
    found, clips = [], []
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        for time in node.times:
            t = torch.tensor(time, dtype=node.attributes["timesteps"].dtype)
            if counts and shadow._step_index is None:
                shadow._init_step_index(t)
            found.append(_level(shadow, t))
            if counts or not clips:
                clips.append(_step(shadow, node.method, signature, t))
    return found, clips[0] if clips else None


def _step(shadow, method: str, signature: Signature, t) -> tuple[float, float] | None:
    """One step on tensors of a few elements, which brings counters and stages further. Returns bounds to which it clips."""
    watch = Watch(2, 4, torch.Generator(), 1.0)
    if "noise_sampler" in shadow.__dict__:
        shadow.noise_sampler = Brownian(watch, torch.float64)
    output, sample = (vector(k, 4, torch.float64, 1.0) for k in range(2))
    if str(shadow.config.get("variance_type")).startswith("learned"):
        output = torch.cat([output, output], 1)
    given = {**dict.fromkeys(signature.names), **signature.defaults, "model_output": output, "timestep": t, "sample": sample}
    if "generator" in given:
        given["generator"] = watch.given
    with watch:
        getattr(type(shadow), method)(shadow, **given)
    return watch.clip and (watch.clip.lo, watch.clip.hi)


def _level(shadow, t: torch.Tensor) -> Level:
    name = type(shadow).__name__
    image, noise = torch.eye(2, dtype=torch.float64).view(2, 1, 1, 1, 2)
    if callable(getattr(shadow, "scale_noise", None)):
        point = shadow.scale_noise(image, t[None], noise)
    elif callable(getattr(shadow, "add_noise", None)):
        point = shadow.add_noise(image, noise, t[None])
    else:
        raise ValueError(f"{name} cannot be steered: it has neither add_noise nor scale_noise, which say at which noise level "
                         "its model is called")
    alpha, sigma = point.flatten().tolist()
    if not getattr(shadow, "state_in_first_order", True) and alpha == 1 and hasattr(shadow, "scale_model_input"):
        scale = float(shadow.scale_model_input(torch.ones(1, 1, 1, 1, dtype=torch.float64), t))
        sigma = math.sqrt(max(1 / scale**2 - 1, 0.0))
    alpha = max(alpha, sigma / PURE_NOISE)
    return Level(alpha, sigma, *_denoised(shadow, name, alpha, sigma))


def _denoised(shadow, name: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(of_sample, of_output) at a level, by what the model predicts."""
    config = shadow.config
    if hasattr(shadow, "precondition_outputs"):
        one, zero = torch.eye(2, dtype=torch.float64)
        return tuple(shadow.precondition_outputs(one, zero, torch.tensor(sigma, dtype=torch.float64)).tolist())
    prediction = config.get("prediction_type", "flow_prediction" if hasattr(shadow, "scale_noise") else None)
    whole = math.hypot(alpha, sigma)
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        return alpha / whole**2, -sigma / whole
    if prediction in ("sample", "original_sample"):
        return 0.0, 1.0
    if prediction == "flow_prediction" and abs(alpha + sigma - 1) < 1e-5:
        return 1.0, -sigma
    raise ValueError(f"{name} cannot be steered: its model predicts {prediction!r}, at alpha={alpha:.4g}, sigma={sigma:.4g}; "
                     "'epsilon', 'v_prediction', 'sample' and, where alpha is 1 - sigma, 'flow_prediction' are taken")


def plan_of(name: str, levels: list[Level], times: list[float], order: int, clip, start: int = 0) -> Plan:
    """What actions are told of a run: row i is the call of the model at the i-th timestep, and writes its denoised estimate.

    order: calls of a step; clip: bounds of the estimate, or None; start: the first of the timesteps that the run comes to.
    """
    after = [*levels[1:], Level(1.0, 0.0, 0.0, 0.0)]
    rows = []
    for i, (here, following) in enumerate(zip(levels, after)):
        calls = i >= start
        d = {"x": here.of_sample, "out": here.of_output} if calls else {}
        rows.append(Row(
            d=d, y=({"d": 1.0} if calls else {"x": 1.0},), clip=(*clip, 1.0) if clip and calls else None,
            sigma=here.sigma / here.alpha, sigma_next=following.sigma / following.alpha, time=float(times[i]),
            input_scale=here.alpha, base_scale=following.alpha, calls_model=calls, step=i // order))  # fmt: skip
    return Plan.from_rows(rows, name=name)
