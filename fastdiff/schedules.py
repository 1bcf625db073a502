"""Noise schedules and time grids.

A schedule says what x_t = alpha(t) x0 + sigma(t) n is. Samplers need only the noise level relative to the signal,
sigma_ve = sigma / alpha, and alpha as a function of it:

    VE    alpha = 1                       EDM (Karras et al. 2022): t is sigma itself
    VP    alpha = 1 / sqrt(1 + sigma_ve^2)    DDPM (Ho et al. 2020): t is the timestep, alpha = sqrt(alpha_bar_t)
    flow  alpha = 1 / (1 + sigma_ve)          flow matching (Lipman et al. 2023): alpha = 1 - t, sigma = t

A grid is the decreasing noise levels at which a sampler stops, (steps + 1,), the last one mostly 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .grids import GRIDS
from .noise import unknown

__all__ = ["SCHEDULES", "EDM", "Flow", "Schedule", "VP", "check_sigmas", "schedule"]

PURE_NOISE = 1e12
"""sigma_ve where alpha is 0 (flow at t = 1, VP with zero terminal SNR). In float32 the coefficients, which are ratios,
are those of the limit; in float64 nothing is singular."""


@dataclass(frozen=True)
class Schedule:
    """What every schedule answers; t may be an array. `kind` is "ve", "vp" or "flow"."""

    kind = "ve"
    default_grid = "karras"

    def alpha(self, t):
        return self.alpha_at(self.sigma_ve(t))

    def sigma(self, t):
        return self.sigma_ve(t) * self.alpha(t)

    def sigma_ve(self, t):
        """sigma(t) / alpha(t), at most PURE_NOISE."""
        raise NotImplementedError

    def t(self, sigma_ve):
        """The inverse of sigma_ve."""
        raise NotImplementedError

    def alpha_at(self, sigma_ve):
        """alpha as a function of sigma_ve."""
        raise NotImplementedError

    def time(self, sigma_ve: float, kind: str) -> float:
        """The model's time argument of this kind."""
        raise NotImplementedError

    def prior(self, sigma_ve: float) -> float:
        """Standard deviation of x / alpha where sampling starts from noise alone."""
        return sigma_ve

    def grid(self, name: str | None = None, steps: int = 50, **options) -> np.ndarray:
        """Noise levels (steps + 1,) of a named grid, decreasing; see `fastdiff.grids`."""
        name = self.default_grid if name is None else name
        if name not in GRIDS:
            raise ValueError(unknown("grid", name, GRIDS))
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
            raise ValueError(f"steps is {steps!r}; it takes an int of 1 or more")
        return check_sigmas(GRIDS[name](self, int(steps), **options))


@dataclass(frozen=True)
class EDM(Schedule):
    """Karras et al. 2022, table 1: sigma(t) = t, from sigma_max down to sigma_min."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    kind = "ve"

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}; it takes 0 < sigma_min < sigma_max < inf"
            )
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data is {self.sigma_data}; it takes a finite number > 0")

    def sigma_ve(self, t):
        return np.asarray(t, np.float64)[()]

    def t(self, sigma_ve):
        return np.asarray(sigma_ve, np.float64)[()]

    def alpha_at(self, sigma_ve):
        return np.ones_like(sigma_ve, np.float64)[()]

    def time(self, sigma_ve, kind):
        if kind == "sigma":
            return float(sigma_ve)
        if kind == "c_noise":
            return math.log(sigma_ve) / 4  # Karras et al. 2022, table 1
        raise ValueError(unknown("time of an EDM schedule", kind, ("sigma", "c_noise")))


@dataclass(frozen=True, eq=False)
class VP(Schedule):
    """Variance preserving, from a table of betas; between timesteps ln sigma_ve is interpolated linearly.

    betas: (T,), the increments of DDPM, alpha_bar_t = prod (1 - beta); t is the timestep, 0 to T - 1, fractional too.
    """

    betas: np.ndarray = field(repr=False)
    name: str = "vp"
    kind = "vp"
    default_grid = "trailing"

    def __post_init__(self):
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(
                f"betas has shape {betas.shape} and values from {betas.min(initial=1)} to {betas.max(initial=0)}; "
                "it takes (T,), T >= 2, 0 < beta <= 1"
            )
        bar = np.cumprod(1 - betas)
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", bar)
        with np.errstate(divide="ignore"):
            object.__setattr__(self, "_log_sigma", np.log(np.minimum(np.sqrt((1 - bar) / bar), PURE_NOISE)))

    @property
    def timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.betas)

    @property
    def sigma_min(self):
        return math.exp(self._log_sigma[0])

    @property
    def sigma_max(self):
        return math.exp(self._log_sigma[-1])

    def sigma_ve(self, t):
        t = np.asarray(t, np.float64)
        if not ((t >= 0) & (t <= self.timesteps - 1)).all():
            raise ValueError(f"t is {t}; it takes timesteps from 0 to {self.timesteps - 1}")
        return np.exp(np.interp(t, np.arange(self.timesteps), self._log_sigma))[()]

    def t(self, sigma_ve):
        with np.errstate(divide="ignore"):
            t = np.interp(np.log(sigma_ve), self._log_sigma, np.arange(self.timesteps))
        return np.where(abs(t - np.rint(t)) < 1e-6, np.rint(t), t)[()]  # whole timesteps come back whole

    def alpha_at(self, sigma_ve):
        return (1 / np.hypot(1, sigma_ve))[()]

    def prior(self, sigma_ve):
        return math.hypot(1, sigma_ve)  # x_T ~ N(0, 1)

    def time(self, sigma_ve, kind):
        if kind == "timestep":
            return float(self.t(sigma_ve))
        if kind == "sigma":
            return float(sigma_ve)
        if kind == "c_noise":
            return math.log(sigma_ve) / 4
        raise ValueError(unknown("time of a VP schedule", kind, ("timestep", "sigma", "c_noise")))

    @classmethod
    def linear(cls, beta_start=1e-4, beta_end=0.02, timesteps=1000):
        """DDPM (Ho et al. 2020, section 4)."""
        return cls(_betas("linear", beta_start, beta_end, timesteps), "linear")

    @classmethod
    def scaled_linear(cls, beta_start=0.00085, beta_end=0.012, timesteps=1000):
        """Latent diffusion (Rombach et al. 2022): sqrt(beta) is linear."""
        return cls(_betas("scaled_linear", beta_start, beta_end, timesteps), "scaled_linear")

    @classmethod
    def cosine(cls, s=0.008, timesteps=1000, max_beta=0.999):
        """Nichol & Dhariwal 2021, eq. 17: alpha_bar(t) = cos^2((t/T + s)/(1 + s) pi/2), beta clipped at max_beta."""
        t = np.arange(_count("timesteps", timesteps, 2) + 1) / timesteps
        bar = np.cos((t + s) / (1 + s) * np.pi / 2) ** 2
        return cls(np.minimum(1 - bar[1:] / bar[:-1], max_beta), "cosine")

    def zero_terminal_snr(self) -> "VP":
        """Lin et al. 2023, algorithm 1: sqrt(alpha_bar) shifted and scaled to end at 0. Not for epsilon."""
        root = np.sqrt(self.alphas_cumprod)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        bar = root**2
        return VP(1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]]), self.name + "_zero_snr")


def _count(name, value, least):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {value!r}; it takes an int of {least} or more")
    return int(value)


def _betas(name, start, end, timesteps):
    if not 0 < start < end < 1:
        raise ValueError(f"beta_start={start}, beta_end={end}; it takes 0 < beta_start < beta_end < 1")
    power = 2 if name == "scaled_linear" else 1
    return np.linspace(start ** (1 / power), end ** (1 / power), _count("timesteps", timesteps, 2)) ** power


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow: x_t = (1 - t) x0 + t n, t from 1 down to 0.

    shift: the grid's t goes to shift t / (1 + (shift - 1) t), so that resolution and noise match (Esser et al. 2024,
    eq. 23); `Flow.dynamic` takes it from the image's size, as FLUX does.
    """

    shift: float = 1.0
    kind = "flow"
    default_grid = "uniform"

    def __post_init__(self):
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; it takes a finite number > 0")

    @classmethod
    def dynamic(cls, tokens: int, base_tokens=256, max_tokens=4096, base_mu=0.5, max_mu=1.15):
        """shift = exp(mu), mu linear in the number of tokens (FLUX; Esser et al. 2024, section 5.3.2)."""
        slope = (max_mu - base_mu) / (max_tokens - base_tokens)
        return cls(math.exp(base_mu + slope * (_count("tokens", tokens, 1) - base_tokens)))

    @property
    def sigma_min(self):
        return float(self.sigma_ve(self.shifted(1e-3)))

    @property
    def sigma_max(self):
        return PURE_NOISE

    def shifted(self, t):
        t = np.asarray(t, np.float64)
        return (self.shift * t / (1 + (self.shift - 1) * t))[()]

    def sigma_ve(self, t):
        t = np.asarray(t, np.float64)
        if not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"t is {t}; it takes flow times from 0 to 1")
        with np.errstate(divide="ignore"):
            return np.minimum(t / (1 - t), PURE_NOISE)[()]

    def t(self, sigma_ve):
        return (sigma_ve / (1 + np.asarray(sigma_ve, np.float64)))[()]

    def alpha_at(self, sigma_ve):
        return (1 / (1 + np.asarray(sigma_ve, np.float64)))[()]

    def time(self, sigma_ve, kind):
        if kind == "t":
            return float(self.t(sigma_ve))
        if kind == "timestep":
            return 1000 * float(self.t(sigma_ve))
        raise ValueError(unknown("time of a flow schedule", kind, ("t", "timestep")))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": VP.linear,
    "scaled_linear": VP.scaled_linear,
    "cosine": VP.cosine,
    "edm": EDM,
    "flow": Flow,
}


def schedule(given: "str | Schedule", **options) -> Schedule:
    """A schedule by name, with the options of its constructor; or the schedule that was given."""
    if isinstance(given, Schedule):
        if options:
            raise TypeError(f"options {', '.join(options)} go with a schedule's name; given was {given!r}")
        return given
    if not isinstance(given, str):
        raise TypeError(f"schedule is {given!r}; it takes a name ({', '.join(SCHEDULES)}) or a Schedule")
    if given not in SCHEDULES:
        raise ValueError(unknown("schedule", given, SCHEDULES))
    return SCHEDULES[given](**options)


def check_sigmas(sigmas) -> np.ndarray:
    """Noise levels as float64 (steps + 1,), or ValueError: they must be finite, >= 0 and strictly decreasing."""
    sigmas = np.array(sigmas, dtype=np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas has shape {sigmas.shape}; it takes (steps + 1,), at least 2 levels")
    for wrong, rule in ((~np.isfinite(sigmas), "finite levels"), (sigmas < 0, "levels >= 0")):
        if wrong.any():
            raise ValueError(f"sigmas[{np.argmax(wrong)}] is {sigmas[wrong][0]}; it takes {rule}")
    rising = np.flatnonzero(np.diff(sigmas) >= 0)
    if len(rising):
        i = rising[0]
        raise ValueError(
            f"sigmas[{i}] = {sigmas[i]} is followed by {sigmas[i + 1]}; it takes strictly decreasing levels"
        )
    return sigmas
