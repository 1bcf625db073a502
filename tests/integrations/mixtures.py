"""The exact denoiser of two Gaussians in the coordinates of each of diffusers' schedulers, and runs that share noise.

Element e of the data is drawn from N(-m_e, 0.3^2) or N(m_e, 0.3^2), so that for x = a x0 + b n, with v = a^2 s^2 + b^2,

    E[x0 | x] = (a s^2 x + m b^2 tanh(a m x / v)) / v,     s = 0.3

m_e runs from 0.5 to 1.5 within a sample: were it one number, elements that begin at the same of bfloat16's few values would stay
the same, and their rounding errors with them.
"""

import math
from contextlib import contextmanager

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

SPREAD = 0.3


def posterior(x, a, b):
    """E[x0 | x], for x of shape (B, ...)."""
    mean = torch.linspace(0.5, 1.5, x[0].numel(), dtype=torch.float64).view(x.shape[1:]).to(x.dtype)
    v = a * a * SPREAD**2 + b * b
    return (a * SPREAD**2 * x + mean * b * b * torch.tanh(a * mean * x / v)) / v


def network(scheduler):
    """What a trained network would return for (input of the model, timestep): computed in float32 at least, and rounded to the
    dtype of the input. None for a scheduler whose coordinates are not known here."""
    config, name = scheduler.config, type(scheduler).__name__
    if hasattr(scheduler, "precondition_inputs"):
        predict = _edm(scheduler, cosine=name.startswith("Cosine"))
    elif config.get("use_flow_sigmas") or "Flow" in name or "RF" in name:
        predict = _flow(config.get("num_train_timesteps", 1000))
    elif name == "ScoreSdeVeScheduler":
        predict = _score(scheduler.config)
    elif name == "SCMScheduler":
        predict = _rotated(lambda t: math.cos(t) ** 2, "v_prediction")
    elif name == "DDPMWuerstchenScheduler":
        predict = _rotated(lambda t: float(scheduler._alpha_cumprod(torch.tensor([t]), "cpu")), "epsilon")
    elif hasattr(scheduler, "alphas_cumprod"):
        cumulative = scheduler.alphas_cumprod.double().numpy()
        square = lambda t: float(np.interp(t, np.arange(len(cumulative)), cumulative))
        predict = _rotated(square, config.get("prediction_type", "epsilon"))
    else:
        return None

    def evaluate(x, t, channels=None):
        t = float(t.reshape(-1)[0]) if isinstance(t, torch.Tensor) else float(t)
        return predict(x if x.dtype == torch.float64 else x.float(), t).to(x.dtype)

    return evaluate


def _rotated(square, prediction):
    """x = a x0 + b n with a^2 + b^2 = 1; square: a^2 of t."""

    def predict(x, t):
        a, b = math.sqrt(square(t)), math.sqrt(1 - square(t))
        x0 = posterior(x, a, b)
        n = (x - a * x0) / b
        return {"epsilon": n, "sample": x0, "v_prediction": a * n - b * x0}[prediction]

    return predict


def _flow(steps):
    def predict(x, t):
        b = t / steps
        return (x - posterior(x, 1 - b, b)) / b

    return predict


def _score(config):
    def predict(x, t):
        b = config.sigma_min * (config.sigma_max / config.sigma_min) ** t
        return (posterior(x, 1.0, b) - x) / (b * b)

    return predict


def _edm(scheduler, cosine):
    """The scheduler's preconditioning is affine in what the network returns: turned round."""
    width = scheduler.config.sigma_data

    def predict(x, t):
        b = math.tan(math.pi * t / 2) if cosine else math.exp(4 * t)
        x = x * math.sqrt(b * b + width * width)  # scale_model_input divided by it
        one, level = torch.ones((), dtype=x.dtype), torch.tensor(b, dtype=x.dtype)
        skip = scheduler.precondition_outputs(one, 0 * one, level)
        return (posterior(x, 1.0, b) - skip * x) / scheduler.precondition_outputs(0 * one, one, level)

    return predict


class _Recorded(TorchFunctionMode):
    """Notes the dtypes of draws, or draws in the dtypes that were noted and returns float64."""

    def __init__(self, dtypes, replay):
        super().__init__()
        self.dtypes, self.left = dtypes, iter(dtypes) if replay else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **kwargs)
        if self.left is not None:
            return func(*args, **{**kwargs, "dtype": next(self.left)}).double()
        drawn = func(*args, **kwargs)
        self.dtypes.append(drawn.dtype)
        return drawn


@contextmanager
def shared_noise(monkeypatch, kept, replay):
    """A run whose noise is kept, or which gets it back in float64: what is drawn by torch, and along Brownian paths."""
    try:
        from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
    except ImportError:
        BrownianTreeNoiseSampler = None
    draws, paths = kept.setdefault("dtypes", []), kept.setdefault("paths", [])
    with monkeypatch.context() as patch, _Recorded(draws, replay):
        if BrownianTreeNoiseSampler is not None:
            own, left = BrownianTreeNoiseSampler.__call__, iter(list(paths))

            def along(sampler, *between):
                if replay:
                    return next(left).double()
                paths.append(own(sampler, *between))
                return paths[-1]

            patch.setattr(BrownianTreeNoiseSampler, "__call__", along)
        yield
