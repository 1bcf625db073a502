"""NVlabs' EDM samplers, fused: the two functions of its ``generate.py``, with their parameters.

    from fastdiff.integrations.edm import edm_sampler

    images = edm_sampler(net, latents, class_labels, num_steps=18)

Each call of the network is followed by one row. `_stages` is the ablation sampler for every schedule and scaling of the paper
(Karras et al. 2022, arXiv:2206.00364); with sigma(t) = t and s(t) = 1 it is algorithm 2, and its table that of `heun`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ..action import Acting, Action, Setting, checked_output
from ..noise import as_seeds, default_seeds, unknown
from ..plan import Plan
from ..sample import Progress, sample
from ..samplers.assemble import assemble
from ..samplers.stage import Linear, Noise, Stage, d, noise, past, x, xe

__all__ = ["ablation_sampler", "edm_sampler"]

NOISES = ("torch", "philox")
_CHOICES = {"solver": ("euler", "heun"), "discretization": ("vp", "ve", "iddpm", "edm"), "schedule": ("vp", "ve", "linear"),
            "scaling": ("vp", "none")}


def edm_sampler(
    net,
    latents: torch.Tensor,
    class_labels=None,
    randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
    *,
    noise: str = "torch",
    seeds: int | Sequence[int] | torch.Tensor | None = None,
    steering: Sequence[Action] = (),
    callback: Callable[[Progress], None] | None = None,
) -> torch.Tensor:
    """Algorithm 2 of Karras et al. 2022 (arXiv:2206.00364): Heun's method with churn, as NVlabs' ``edm_sampler``.

    net: called as net(x, sigma, class_labels), x (B, ...) and sigma (B,) float32; returns the denoised x. It has sigma_min
    and sigma_max, which bound the levels, and round_sigma, which every level goes through. latents: (B, ...), of unit variance.
    S_churn, S_min, S_max, S_noise: the paper's; noise is added where S_min <= sigma <= S_max.

    noise: "torch": randn_like is called once a step on a tensor like latents in float64, as the original does, also where
    the noise has no weight: the same pictures up to rounding. "philox": drawn inside of the row, sample b from its own seed.
    seeds: (B,) or one int s for s, s + 1, ..., of "philox" and of steering that draws; None: s comes from torch's default
    generator with "philox", and is 0 with "torch". steering: actions, as ``fd.sample`` takes them. callback: called after
    each call of net, with ``fd.Progress``.

    Returns (B, ...) float32 (the original: float64). Raises ``ValueError``/``TypeError`` before net is called,
    ``FloatingPointError`` for a NaN.

    >>> class Net:                                                         # the exact denoiser of N(0, 0.25)
    ...     sigma_min, sigma_max, round_sigma = 0.0, float("inf"), staticmethod(torch.as_tensor)
    ...     def __call__(self, x, sigma, class_labels=None):
    ...         return x * 0.25 / (0.25 + sigma.view(-1, 1, 1, 1) ** 2)
    >>> edm_sampler(Net(), torch.randn(2, 3, 8, 8), S_churn=10).shape
    torch.Size([2, 3, 8, 8])
    """
    return ablation_sampler(**locals())  # whose further parameters are those of algorithm 2 by default


def ablation_sampler(
    net,
    latents: torch.Tensor,
    class_labels=None,
    randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7,
    solver: str = "heun",
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
    alpha: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
    *,
    noise: str = "torch",
    seeds: int | Sequence[int] | torch.Tensor | None = None,
    steering: Sequence[Action] = (),
    callback: Callable[[Progress], None] | None = None,
) -> torch.Tensor:
    """The sampler of which the paper's others are cases (Karras et al. 2022: algorithm 1 for any sigma(t) and s(t), with the
    churn of algorithm 2 and the alpha of algorithm 3), as NVlabs' ``ablation_sampler``. Parameters that are not named here: see
    `edm_sampler`.

    solver: "euler" or "heun"; discretization of the levels: "vp", "ve", "iddpm" or "edm"; schedule sigma(t): "vp", "ve" or
    "linear"; scaling s(t): "vp" or "none". sigma_min, sigma_max: None for those of the discretization. epsilon_s, C_1, C_2, M:
    of the VP and iDDPM discretizations. alpha: where in the step Heun's second call is, 0 < alpha <= 1 (1: at its end, 1/2: the
    midpoint rule, 2/3: Ralston's method).
    """
    for name, value in (("solver", solver), ("discretization", discretization), ("schedule", schedule), ("scaling", scaling)):
        if value not in _CHOICES[name]:
            raise ValueError(unknown(name, value, _CHOICES[name]))
    _check_run(net, latents, randn_like, noise)
    num_steps, M = _whole("num_steps", num_steps, 2), _whole("M", M, 1)
    _check_numbers(rho=rho, epsilon_s=epsilon_s, alpha=alpha, C_1=C_1, positive=True)
    _check_numbers(S_churn=S_churn, S_min=S_min, S_noise=S_noise, C_2=C_2)
    if not is_number(S_max) or not S_min <= S_max:
        raise ValueError(f"S_min is {S_min!r}, S_max is {S_max!r}: numbers with S_min <= S_max are taken")
    if alpha > 1 or epsilon_s >= 1:
        raise ValueError(f"alpha is {alpha!r}, epsilon_s is {epsilon_s!r}: 0 < alpha <= 1 and 0 < epsilon_s < 1 are taken")
    low, high = _range(net, discretization, sigma_min, sigma_max, epsilon_s)
    beta = _beta(low, high, epsilon_s)
    levels = _levels(discretization, num_steps, low, high, rho, epsilon_s, beta, (M, C_1, C_2))
    gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
    levels, hats = _rounded(net, latents.device, levels, gamma, S_min, S_max)
    weights = [S_noise * math.sqrt(max(hat**2 - level**2, 0.0)) for hat, level in zip(hats, levels)]
    seeds, steering = seeds_of(seeds, noise, len(latents)), listed(steering)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {type(callback).__name__}: something that can be called is taken")

    start = latents.to(torch.float64) * levels[0]
    draws = []
    if noise == "torch":
        like = torch.empty_like(latents, dtype=torch.float64)  # a draw in float64 differs from one in float32
        def draw():
            return checked_output(randn_like(like), like.shape, "randn_like")

        draws = [_Draws(draw)]
        start += weights[0] * draw()
    plan = _plan(levels, hats, weights, noise == "torch", solver, _curve(schedule, scaling, *beta), alpha)
    return sample(_Denoiser(net, class_labels), plan, tuple(latents.shape), seeds, device=latents.device, init=start,
                  steering=[*steering, *draws], progress=False, callback=callback)


# ---- what is taken


def _check_run(net, latents, randn_like, noise) -> None:
    missing = [name for name in ("sigma_min", "sigma_max", "round_sigma") if not hasattr(net, name)]
    if not callable(net) or missing:
        raise TypeError(f"net is {type(net).__name__}, without {', '.join(missing) or 'a call'}: a preconditioned network is "
                        "taken, called as net(x, sigma, class_labels), with sigma_min, sigma_max and round_sigma")
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point() or latents.ndim < 2:
        given = f"{tuple(latents.shape)} of {latents.dtype}" if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise TypeError(f"latents is {given}: a tensor (B, ...) of floats is taken")
    if not callable(randn_like):
        raise TypeError(f"randn_like is {type(randn_like).__name__}: something that can be called as randn_like(x) is taken")
    if noise not in NOISES:
        raise ValueError(unknown("noise", noise, NOISES))


def _whole(name: str, value, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name} is {value!r}: an int of {least} or more is taken")
    return value.__index__()


def is_number(value) -> bool:
    one = isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool
    return one or isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _check_numbers(positive: bool = False, **numbers) -> None:
    for name, value in numbers.items():
        if not is_number(value) or not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise ValueError(f"{name} is {value!r}: a finite number {'> 0' if positive else 'of 0 or more'} is taken")


def seeds_of(seeds, noise: str, batch: int) -> torch.Tensor:
    """(B,) int64 on the CPU; None: from torch's default generator where noise is "philox", else 0, 1, ...."""
    return as_seeds(default_seeds(seeds, noise == "philox"), batch)


def listed(steering) -> Sequence[Action]:
    """One action as a list of one. Checked here, since an action of our own joins them."""
    steering = [steering] if hasattr(steering, "begin") else steering
    wrong = [steering] if not isinstance(steering, Sequence) else [a for a in steering if not callable(getattr(a, "begin", None))]
    if wrong:
        raise TypeError(f"steering is or holds {type(wrong[0]).__name__}: a list of actions is taken, such as alignment.at(...)")
    return steering


# ---- levels


def _range(net, discretization, low, high, epsilon_s) -> tuple[float, float]:
    """sigma_min and sigma_max of table 1, within those of the network."""
    vp = _curve("vp", "none", 19.9, 0.1)
    bounds = {"vp": (vp.sigma(epsilon_s), vp.sigma(1.0)), "ve": (0.02, 100), "iddpm": (0.002, 81), "edm": (0.002, 80)}
    least, most = bounds[discretization]
    given = low, high
    for name, value in (("sigma_min", low), ("sigma_max", high)):
        if value is not None and not is_number(value):
            raise TypeError(f"{name} is {value!r}: a number is taken, or None")
    low = max(float(least if low is None else low), float(net.sigma_min))
    high = min(float(most if high is None else high), float(net.sigma_max))
    if not 0 < low < high < math.inf:
        raise ValueError(f"sigma_min={given[0]}, sigma_max={given[1]} and the network's {float(net.sigma_min):g} to "
                         f"{float(net.sigma_max):g} leave {low:g} to {high:g}: 0 < sigma_min < sigma_max < inf is taken")
    return low, high


def _beta(low, high, epsilon_s) -> tuple[float, float]:
    """beta_d and beta_min of the VP schedule that reaches from sigma(epsilon_s) = low to sigma(1) = high."""
    beta_d = 2 * (math.log1p(low**2) / epsilon_s - math.log1p(high**2)) / (epsilon_s - 1)
    return beta_d, math.log1p(high**2) - beta_d / 2


def _levels(discretization, steps, low, high, rho, epsilon_s, beta, iddpm) -> np.ndarray:
    """sigma_i, i < N: the row "time steps" of table 1."""
    i = np.arange(steps) / (steps - 1)
    if discretization == "vp":
        t = 1 + i * (epsilon_s - 1)
        return np.sqrt(np.expm1(beta[0] / 2 * t**2 + beta[1] * t))
    if discretization == "ve":
        return high * (low / high) ** i
    if discretization == "iddpm":
        u = np.array([level for level in _iddpm(*iddpm) if low <= level <= high])
        if not len(u):
            raise ValueError(f"no level of the iDDPM discretization lies in sigma {low:g} to {high:g}: other bounds are taken")
        return u[np.rint((len(u) - 1) * i).astype(int)]
    return (high ** (1 / rho) + i * (low ** (1 / rho) - high ** (1 / rho))) ** rho


@functools.lru_cache
def _iddpm(M: int, C_1: float, C_2: float) -> tuple[float, ...]:
    """u_0 > ... > u_M = 0, with u_{j-1}^2 = (u_j^2 + 1) / max(alpha_bar_{j-1} / alpha_bar_j, C_1) - 1.

    alpha_bar is made in float32, as NVlabs' code does: at the lowest levels that moves u by a percent.
    """
    bar = [(0.5 * math.pi * j / M / (C_2 + 1)).sin() ** 2 for j in torch.arange(M + 1, device="cpu")]
    u = [0.0]
    for j in range(M, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(float(bar[j - 1] / bar[j]), C_1) - 1))
    return tuple(reversed(u))


def _rounded(net, device, levels, gamma, low, high) -> tuple[list[float], list[float]]:
    """The levels (steps + 1,) and sigma_hat of each step, as the network rounds them; read from the device once."""
    levels = torch.as_tensor(net.round_sigma(torch.tensor(levels, dtype=torch.float64, device=device))).to(torch.float64)
    lifted = torch.where((levels >= low) & (levels <= high), levels + gamma * levels, levels)
    hats = torch.stack([torch.as_tensor(net.round_sigma(level)) for level in lifted]).to(levels)
    levels, hats = torch.stack([levels, hats]).tolist()
    if not all(map(math.isfinite, [*levels, *hats])) or min(levels) <= 0 or any(a < b for a, b in pairwise(levels)):
        raise ValueError(f"net.round_sigma gave levels from {levels[0]:g} to {levels[-1]:g}: finite ones above 0 that do not "
                         "rise are taken")
    return [*levels, 0.0], hats


# ---- the plan


class _Curve(NamedTuple):
    """sigma(t) with its rate dsigma/dt and its inverse, and the scaling s as a function of sigma."""

    sigma: Callable[[float], float]
    rate: Callable[[float], float]
    t: Callable[[float], float]
    scaled: bool

    def s(self, sigma: float) -> float:
        return 1 / math.hypot(1, sigma) if self.scaled else 1.0

    def slope(self, t: float, point: Linear, estimate: Linear) -> Linear:
        """dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x / s; sigma), x = s point (algorithm 1, line 4)."""
        sigma, rate = self.sigma(t), self.rate(t)
        s = self.s(sigma)
        ds_over_s = -sigma * rate * s**2 if self.scaled else 0.0
        return s * ((rate / sigma + ds_over_s) * point - rate / sigma * estimate)


def _curve(schedule: str, scaling: str, beta_d: float, beta_min: float) -> _Curve:
    """The rows "schedule" and "scaling" of table 1."""
    if schedule == "vp":

        def sigma(t):
            return math.sqrt(math.expm1(beta_d / 2 * t**2 + beta_min * t))

        return _Curve(sigma, lambda t: (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t)) / 2,
                      lambda s: (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(s**2)) - beta_min) / beta_d, scaling == "vp")
    if schedule == "ve":
        return _Curve(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda s: s**2, scaling == "vp")
    return _Curve(float, lambda t: 1.0, float, scaling == "vp")


def _stages(levels, hats, lifts, solver, curve: _Curve, alpha):
    """The steps, in x0 + sigma n. lifts[i]: the noise that lifts the base before step i, which is part of the row before it.

    An Euler step to t + alpha h; there the second slope; both weighed by 1 - 1/(2 alpha) and 1/(2 alpha) over the whole of h.
    """
    for i, (s, s_next) in enumerate(zip(hats, levels[1:])):
        t, t_next = curve.t(s), curve.t(s_next) if s_next else 0.0  # where beta_min < 0, sigma is 0 at another t too
        h, base = t_next - t, curve.s(s) * x
        lift, level = (lifts[i + 1], hats[i + 1]) if i + 1 < len(hats) else (0, s_next)
        if solver == "euler" or i + 1 == len(hats):
            yield Stage(s, (base + h * curve.slope(t, x, d)) / curve.s(s_next) + lift, level, step=i)
            continue
        t_there, s_there = (t_next, s_next) if alpha == 1 else (t + alpha * h, curve.sigma(t + alpha * h))
        yield Stage(s, x, s, (base + alpha * h * curve.slope(t, x, d)) / curve.s(s_there), s_there, step=i)
        slope, slope_there = curve.slope(t, x, past(1)), curve.slope(t_there, xe, d)
        x_next = base + h * ((1 - 1 / (2 * alpha)) * slope + 1 / (2 * alpha) * slope_there)
        yield Stage(s_there, x_next / curve.s(s_next) + lift, level, step=i)


def _plan(levels, hats, weights, started, solver, curve, alpha) -> Plan:
    """The run as rows, which starts at sigma_0 latents. started: the noise of step 0 is in there already."""
    lifts = [noise("churn", i, w) for i, w in enumerate(weights)]
    begin = Stage(None, x if started else x + lifts[0], hats[0])
    stages = [begin, *_stages(levels, hats, lifts, solver, curve, alpha)]
    made = assemble(stages, alpha=lambda s: 1.0, time=float, prediction="denoised", start_sigma=levels[0])
    return Plan.from_rows(**made, name="edm_sampler", info={"schedule": "edm", "prediction": "denoised", "time": "sigma",
                                                            "start": "latent", "solver": solver})


def with_noise_given(plan: Plan) -> Plan:
    """The plan whose own noise is not drawn in its rows but comes as one more input, "noise"; unchanged where it has none."""

    def renamed(terms):
        return {"noise" if isinstance(s, Noise) and s.stream in ("churn", "step") else s: c for s, c in terms.items()}

    rows = [replace(row, y=tuple(map(renamed, row.y))) for row in plan.rows]
    if not any("noise" in terms for row in rows for terms in row.y):
        return plan
    return Plan.from_rows(rows, inputs=(*plan.inputs, "noise"), outputs=plan.outputs, ring=plan.ring, bank=plan.bank,
                          name=plan.name, info=plan.info)


# ---- the run


def answer_of(who: str, network, x, *args, **kwargs):
    """network(x, ...). Raises ``RuntimeError`` where it writes into x, a buffer of the run that a row has yet to read. torch counts
    no writes into inference tensors."""
    before = None if x.is_inference() else x._version
    answer = network(x, *args, **kwargs)
    if before is not None and x._version != before:
        raise RuntimeError(f"{who} wrote into x, which the step has yet to read: one that returns a new tensor is taken")
    return answer


class _Denoiser(torch.nn.Module):
    """The network as a plan's model. A module, so that steering finds the network's blocks in it."""

    def __init__(self, net, class_labels):
        super().__init__()
        self.net, self.class_labels = net, class_labels

    def forward(self, x, sigma):
        denoised = answer_of("net", self.net, x, sigma, self.class_labels)
        return denoised.float() if isinstance(denoised, torch.Tensor) and denoised.dtype == torch.float64 else denoised


class _Draws(Acting):
    """Noise that is drawn outside of the row: once a step, after the model's last call in the one before it, and also where
    nothing reads it, as the original does. The last of the actions, so that it sees the rows as they will be."""

    def __init__(self, draw: Callable[[], torch.Tensor]):
        self._draw = draw

    def begin(self, setting: Setting) -> Acting:
        self.plan = with_noise_given(setting.plan)
        self._given = self.plan is not setting.plan
        steps = self.plan.steps.tolist()
        self._reads = ["noise" in row.y[0] for row in self.plan.rows]
        self._draws = [a != b or reads for a, b, reads in zip(steps, [*steps[1:], steps[-1]], self._reads)]
        return self

    def outputs(self, run, evaluate):
        outputs, noise = evaluate(), run.x  # a row that does not read it may be given anything
        if self._draws[run.row]:
            drawn = self._draw()
            noise = drawn.to(torch.float32) if self._reads[run.row] else noise
        return (*outputs, noise) if self._given else outputs
