"""A call of a scheduler's step on tiny tensors, and a watch over what it draws and clips.

The first ``BASIS`` places of a tensor hold a basis vector, the others random numbers; the first of those is 0 in all tensors.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.overrides import TorchFunctionMode

__all__ = ["BASIS", "TOLERANCE", "VALUES", "Brownian", "Call", "Clip", "Draw", "NotLinear", "Signature", "Watch", "read",
           "thresholds_by_quantile", "vector"]

BASIS, CHECKS = 128, 17  # places for basis vectors, and for checks: the first of these is 0 in all inputs
LENGTH = BASIS + CHECKS
TOLERANCE = 2e-5  # many schedulers compute in float32, and difference large numbers
_DRAWS = {torch.randn: "randn", torch.randn_like: "randn_like"}
_OTHER_DRAWS = {
    torch.rand,
    torch.rand_like,
    torch.randint,
    torch.randint_like,
    torch.normal,
    torch.bernoulli,
    torch.multinomial,
    torch.randperm,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.bernoulli_,
}
_CLAMPS = {torch.clamp, torch.clip, torch.Tensor.clamp, torch.Tensor.clip}


class NotLinear(Exception):
    """A step that no row can express; the message says why."""


def _random() -> np.ndarray:
    """(BASIS, CHECKS - 1) numbers that float32 holds exactly, from 0.1 to 60: a clip must not go unseen."""
    rng = np.random.default_rng(20240229)
    return (rng.standard_normal((BASIS, CHECKS - 1)) * np.logspace(-1, 1.5, CHECKS - 1)).astype(np.float32).astype(np.float64)


VALUES = np.concatenate([np.eye(BASIS), np.zeros((BASIS, 1)), _random()], 1)


def vector(k: int, ndim: int, dtype: torch.dtype, size: float) -> torch.Tensor:
    if k >= BASIS:
        raise NotLinear(f"the step has more than {BASIS} inputs")
    return torch.from_numpy(VALUES[k] * size).reshape(*(1,) * (ndim - 1), LENGTH).to(dtype)


class Call(NamedTuple):
    """What a row depends on, beside the scheduler's state.

    ndim: of the latent; tensors: (name, dtype) of the arguments of its shape, which are the row's first slots; times:
    (name, kind, value) of the timesteps, kind being a dtype and a number of dimensions, or the type of a Python number;
    plain: (name, value); generator: whether one was given.
    """

    ndim: int
    tensors: tuple[tuple[str, torch.dtype], ...]
    times: tuple[tuple[str, object, object], ...]
    plain: tuple[tuple[str, object], ...]
    generator: bool | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.tensors)

    @property
    def time(self):
        return next(value for name, _, value in self.times if name == "timestep")

    def at(self, time) -> Call:
        """The call with another timestep."""
        times = tuple((name, kind, time if name == "timestep" else value) for name, kind, value in self.times)
        return self._replace(times=times)

    def arguments(self, given: torch.Generator, dtypes, size: float) -> dict:
        """What the scheduler's step is called with; dtypes, size: of the tensors."""
        arguments = {name: vector(k, self.ndim, dtype, size) for k, ((name, _), dtype) in enumerate(zip(self.tensors, dtypes))}
        for name, kind, value in self.times:
            if isinstance(kind, type):
                arguments[name] = value
            else:
                arguments[name] = torch.full((1,) * kind[1], value, dtype=kind[0])
        if self.generator is not None:
            arguments["generator"] = given if self.generator else None
        return {**arguments, **dict(self.plain)}


class Draw(NamedTuple):
    """How the scheduler draws a noise: "randn_tensor", "randn_like", or "brownian" between two levels."""

    how: str
    dtype: torch.dtype
    generator: bool
    between: tuple | None = None


class Clip(NamedTuple):
    """slot: of what is clipped, once it is; before: its coefficients (BASIS,), and then what it is on the checks; lo, hi: bounds.
    quantile: of dynamic thresholding, d = clip(d, -s, s) / s, s this quantile of |d| limited to lo and hi."""

    slot: int
    before: np.ndarray
    lo: float
    hi: float
    quantile: float | None = None


class Watch(TorchFunctionMode):
    """Replaces what the step draws, and a static clip's result, by basis vectors."""

    def __init__(self, first: int, ndim: int, given: torch.Generator, size: float):
        super().__init__()
        self.next, self.ndim, self.given, self.size = first, ndim, given, size
        self.shape = (*(1,) * (ndim - 1), LENGTH)
        self.draws: list[Draw] = []
        self.noise_slots: list[int] = []
        self.clip: Clip | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _DRAWS:
            return self._draw(_DRAWS[func], args, kwargs)
        if func in _OTHER_DRAWS:
            raise NotLinear(f"it draws by {getattr(func, '__name__', func)}")
        out = func(*args, **kwargs)
        if func in _CLAMPS and self.clip is None and isinstance(args[0], torch.Tensor) and tuple(args[0].shape) == self.shape:
            return self._clipped(args, kwargs, out)
        return out

    def _draw(self, how, args, kwargs):
        if how == "randn":
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            dtype, how = kwargs.get("dtype") or torch.get_default_dtype(), _caller()
        else:
            size = args[0].shape
            dtype = kwargs.get("dtype") or args[0].dtype
        if tuple(size) != self.shape:
            raise NotLinear(f"it draws noise of shape {tuple(size)} for a latent of {self.shape}")
        if how is None:
            raise NotLinear("it draws noise by torch.randn itself: where, cannot be seen")
        return self.noise(Draw(how, dtype, kwargs.get("generator") is self.given))

    def noise(self, draw: Draw) -> torch.Tensor:
        self.draws.append(draw)
        self.noise_slots.append(self.next)
        self.next += 1
        return vector(self.noise_slots[-1], self.ndim, draw.dtype, self.size)

    def _clipped(self, args, kwargs, out):
        bounds = [kwargs.get(name, args[i] if len(args) > i else None) for i, name in ((1, "min"), (2, "max"))]
        if any(b is None or isinstance(b, torch.Tensor) and b.numel() != 1 for b in bounds):
            return out
        slot, self.next = self.next, self.next + 1
        self.clip = Clip(slot, read(args[0]), float(bounds[0]), float(bounds[1]))
        out = out.clone()
        out.reshape(-1)[:BASIS] = 0
        out.reshape(-1)[slot] = self.size
        return out


    def threshold(self, config):
        """What stands for a scheduler's ``_threshold_sample``: the result is one more basis vector."""

        def threshold_sample(sample):
            if self.clip is not None or tuple(sample.shape) != self.shape:
                raise NotLinear("it thresholds more than one estimate")
            slot, self.next = self.next, self.next + 1
            most, ratio = float(config["sample_max_value"]), float(config["dynamic_thresholding_ratio"])
            self.clip = Clip(slot, read(sample), min(1.0, most), most, ratio)  # torch.clamp: the upper end wins
            return vector(slot, self.ndim, sample.dtype, self.size)

        return threshold_sample


def thresholds_by_quantile(scheduler) -> bool:
    """Whether a scheduler thresholds as Saharia et al. (arXiv:2205.11487) do: looked at on two samples of 42 numbers."""
    config = scheduler.config
    d = torch.from_numpy(VALUES[1:3, BASIS:].repeat(3, 1)[:, :42]).reshape(2, 3, 2, 7).float()
    s = torch.quantile(d.abs().flatten(1), config["dynamic_thresholding_ratio"], dim=1).clamp(1, config["sample_max_value"])
    s = s.view(2, 1, 1, 1)
    expected = torch.maximum(torch.minimum(d, s), -s) / s
    return torch.allclose(scheduler._threshold_sample(d), expected, rtol=1e-6, atol=1e-6)


def _caller() -> str | None:
    """ "randn_tensor" where that function of diffusers is what draws."""
    code, frame = getattr(randn_tensor, "__wrapped__", randn_tensor).__code__, sys._getframe(2)
    for _ in range(8):
        if frame is None:
            return None
        if frame.f_code is code:
            return "randn_tensor"
        frame = frame.f_back
    return None


class Brownian:
    """In place of the scheduler's Brownian tree: says between which levels noise was asked for."""

    def __init__(self, watch: Watch, dtype: torch.dtype):
        self.watch, self.dtype = watch, dtype

    def __call__(self, start, end):
        return self.watch.noise(Draw("brownian", self.dtype, True, (start, end)))


def read(t: torch.Tensor) -> np.ndarray:
    return t.detach().to(torch.float64).reshape(-1).numpy().copy()


class Signature:
    """The parameters of a scheduler's step, after self. roles: (name, "generator", "time" or "other")."""

    def __init__(self, function):
        parameters = list(inspect.signature(function).parameters.values())[1:]
        self.names = tuple(p.name for p in parameters)
        self._all = set(self.names)
        self.defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        self.fits = {"model_output", "timestep", "sample"} <= set(self.names)
        self.roles = [
            (name, "generator" if name == "generator" else "time" if re.search(r"(^|_)timestep(_|$)", name) else "other")
            for name in self.names
        ]

    def bind(self, args, kwargs) -> dict | None:
        """Every argument by name, or None where the call does not fit: the scheduler itself says why."""
        given = self.defaults.copy()
        given.update(zip(self.names, args))
        given.update(kwargs)
        twice = kwargs and any(name in kwargs for name in self.names[: len(args)])
        return None if twice or len(args) > len(self.names) or given.keys() != self._all else given
