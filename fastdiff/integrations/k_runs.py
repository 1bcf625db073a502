"""One run of a k-diffusion function: its plan, its noise in k-diffusion's order, its callback."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm, trange

from ..action import checked_output
from ..checks import FLOATS, dense, sample_layout
from ..noise import default_seeds, unknown
from ..ops import BACKENDS
from ..plan import Plan, plan
from ..samplers import SAMPLERS
from ..samplers.euler import ancestral_step
from ..samplers.stage import Noise
from ..stepper import Stepper

__all__ = ["NOISES", "Levels", "Run", "as_answer", "checked_arguments", "number", "run", "whole"]

NOISES = ("torch", "philox")
CHURN = ("euler", "heun", "dpm_2")  # draw before each step, even where nothing is added
SDE = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")  # by default along a Brownian path
SLOPES = (*CHURN, "lms", "dpm_fast")  # take their slope from x and denoised before the callback sees them


@dataclass(frozen=True)
class Levels:
    """Noise levels: values, read once to the host; sigmas, as a caller gave them; or times -ln sigma, where the levels that
    callbacks and noise samplers see are the sampler's own (dpm_fast)."""

    values: tuple[float, ...]
    sigmas: torch.Tensor
    times: torch.Tensor | None = None

    @classmethod
    def of(cls, sigmas) -> Levels:
        """sigmas: (steps + 1,), of any dtype."""
        try:
            sigmas = (sigmas if isinstance(sigmas, torch.Tensor) else torch.as_tensor(sigmas, device="cpu")).detach()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"sigmas is {sigmas!r}: a tensor (steps + 1,) is taken") from None
        if sigmas.is_complex() or sigmas.dtype == torch.bool:
            raise TypeError(f"sigmas is {sigmas.dtype}: real numbers are taken")
        sigmas = sigmas if sigmas.is_floating_point() else sigmas.float()
        if sigmas.ndim != 1:
            raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}: (steps + 1,) is taken")
        return cls(tuple(sigmas.cpu().double().tolist()), sigmas)

    @classmethod
    def fast(cls, sigma_min, sigma_max, n: int, device) -> Levels:
        """The levels of dpm_fast: n model calls, in steps of 3 but for the last ones."""
        n = whole("n", n)
        if n < 1:
            raise ValueError(f"n is {n}: an int of 1 or more is taken")
        low, high = (torch.tensor(number(name, value), device="cpu")
                     for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)))
        first, last = high.item(), low.item()
        if not 0 < last < first < math.inf:
            raise ValueError(f"sigma_min is {sigma_min}, sigma_max {sigma_max}: 0 < sigma_min < sigma_max < inf is taken")
        values = [first * (last / first) ** (k / n) for k in range(n)]  # the first and the last of them count
        times = torch.linspace(-high.log(), -low.log(), n // 3 + 2, device=device)
        return cls((*values, last), torch.stack((high, low)), times)

    def at(self, i: int) -> torch.Tensor:
        """(), the level before step i."""
        return self.sigmas[i] if self.times is None else self.times[i].neg().exp()

    def about(self, i: int, sigma: float) -> dict:
        """What a callback is told of step i, whose first call is at the level sigma."""
        here = self.at(i)
        if self.times is not None:
            return {"sigma": here, "sigma_hat": here, "i": i, "t": self.times[i], "t_up": self.times[i]}
        churned = sigma != self.values[i]
        return {"i": i, "sigma": here, "sigma_hat": here * (sigma / self.values[i]) if churned else here}

    def on_host(self) -> Levels:
        return replace(self, sigmas=self.sigmas.cpu())


# ---- plans


@dataclass(frozen=True)
class _Made:
    """A plan; for each row the (step, whether it is the step's last row) of the draw that k-diffusion makes before it, or
    None; the weight of the noise that lifts the start."""

    plan: Plan
    asked: tuple[tuple[int, bool] | None, ...]
    lift: float


@functools.lru_cache(maxsize=64)
def _made(name: str, values: tuple, options: tuple, dtype: torch.dtype, given: bool) -> _Made:
    """given: noise comes as a tensor, one for a row; else the rows draw it."""
    options = dict(options)
    eta = options.get("eta", 0.0)
    if name in SDE and not given:
        options["noise"] = "brownian"
    # by its function, not by name: so the first level is taken as it is, however high
    table = plan(SAMPLERS[name].stages, schedule="edm", prediction="denoised", sigmas=values, start="latent", **options)
    asked = _asked(name, table, values, eta)
    lift = _noise_weight(table.rows[0].y[0])
    table = _noise_where_asked(table, asked, given)
    return _Made(table.with_model_dtype(dtype), asked, lift)


def _asked(name: str, table: Plan, values, eta: float) -> tuple[tuple[int, bool] | None, ...]:
    """Where k-diffusion draws: it draws some noises whose weight is 0, and leaves out some whose weight is not."""

    def asks(i):
        if name in CHURN or name == "dpm_fast":
            return True
        if name in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
            return values[i + 1] > 0 and eta != 0
        if name == "dpm_2_ancestral":  # an Euler step, after which nothing is added
            return ancestral_step(values[i], values[i + 1], eta)[0] > 0
        return name in ("euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde") and values[i + 1] > 0

    steps, count = table.steps.tolist(), int(table.steps[-1]) + 1
    asked = []
    for step, following in zip(steps, [*steps[1:], count]):
        last = following != step
        i = step + 1 if name in CHURN else step  # the row before a step lifts its base
        drawn = 0 <= i < count and (last or name == "dpmpp_sde") and asks(i)
        asked.append((i, last) if drawn else None)
    return tuple(asked)


def _noise_weight(terms) -> float:
    """The weight of one standard normal in place of all that a combination draws."""
    return math.hypot(*(c for symbol, c in terms.items() if isinstance(symbol, Noise)))


def _noise_where_asked(table: Plan, asked, given: bool) -> Plan:
    """The plan without the noise of rows that ask for none; where it is given, as an input "noise", one standard normal, in
    place of the others' terms. The row before the first call can read nothing but the base: its noise is left out too."""

    def changed(row, asks, terms):
        if asks and not given:
            return terms
        weight = _noise_weight(terms) if asks and row.calls_model else 0.0
        kept = {symbol: c for symbol, c in terms.items() if not isinstance(symbol, Noise)}
        return {**kept, "noise": weight} if weight else kept

    rows = [replace(row, y=tuple(changed(row, asks, terms) for terms in row.y)) for row, asks in zip(table.rows, asked)]
    inputs = table.inputs + ("noise",) * any("noise" in terms for row in rows for terms in row.y)
    return Plan.from_rows(rows, inputs=inputs, outputs=table.outputs, ring=table.ring, name=table.name, info=table.info)


# ---- noise as k-diffusion draws it


def _current(name: str, default):
    """What ``k_diffusion.sampling`` has under a name, where it is loaded: front ends put a ``torch`` there that draws from
    seeds of their own, and a ``trange`` that shows progress."""
    return getattr(sys.modules.get("k_diffusion.sampling"), name, default)


def _default_noise_sampler(x):
    return lambda sigma, sigma_next: torch.randn_like(x)


class _BrownianTreeNoiseSampler:
    """The noise of k-diffusion's class of that name: increments of torchsde's tree over the root of their length."""

    def __init__(self, x, sigma_min, sigma_max):
        try:
            import torchsde
        except ImportError as error:
            raise ImportError(
                "k-diffusion's default noise for its SDE samplers takes torchsde (pip install torchsde); noise='philox' and a "
                "noise_sampler of your own do not"
            ) from error
        seed = torch.randint(0, 2**63 - 1, ()).item()
        self._tree = torchsde.BrownianTree(sigma_min, torch.zeros_like(x), sigma_max, entropy=seed)

    def __call__(self, sigma, sigma_next):
        return -self._tree(sigma_next, sigma) / (sigma - sigma_next).sqrt()


class _Draws:
    """The noises of a run: one call for each of k-diffusion's, with its arguments."""

    def __init__(self, name: str, x: torch.Tensor, levels: Levels, noise_sampler, r: float):
        self._name, self._x, self._levels, self._r = name, x, levels, r
        if noise_sampler is None and name in SDE:
            self._levels = levels.on_host()  # where the tree works
            sigmas = self._levels.sigmas
            make = _current("BrownianTreeNoiseSampler", _BrownianTreeNoiseSampler)
            noise_sampler = make(x, sigmas[sigmas > 0].min(), sigmas.max())
        if noise_sampler is None:
            noise_sampler = _current("default_noise_sampler", _default_noise_sampler)(x)
        self._sampler = noise_sampler

    def __call__(self, i: int, last: bool) -> torch.Tensor:
        """The draw of step i; last: the last one of the step."""
        if self._name in CHURN:
            drawn = _current("torch", torch).randn_like(self._x)
        elif self._name == "dpmpp_sde":
            t, t_next = (self._levels.at(k).log().neg() for k in (i, i + 1))
            end = t_next if last else t + (t_next - t) * self._r
            drawn = self._sampler(t.neg().exp(), end.neg().exp())
        else:
            drawn = self._sampler(self._levels.at(i), self._levels.at(i + 1))
        return as_answer(drawn, self._x.shape, "the noise sampler")


def as_answer(value, shape, who: str) -> torch.Tensor:
    """What somebody else's function returned, checked, as a row takes it: float64 becomes float32."""
    value = checked_output(value, shape, who)
    return value.float() if value.dtype == torch.float64 else value


# ---- a run


class Run(Stepper):
    """A run of which a model may keep what it is given: every row writes new tensors, in the layout of the latent given."""

    def __init__(self, made: Plan, start: torch.Tensor, dtype: torch.dtype, seeds):
        self._dtype, self._format = dtype, torch.contiguous_format
        if sample_layout(start) == "channels_last":
            self._format = torch.channels_last if start.ndim == 4 else torch.channels_last_3d
        super().__init__(made, start.shape, seeds, device=start.device, dtype=dtype, init=start)
        self._time = list(self._times.to(dtype).unsqueeze(1).repeat(1, len(start)))  # as sigma * x.new_ones(B)

    def _begin(self, init):
        if self._ring is not None:
            slots, batch = self._ring.shape[:2]
            self._ring = self._empty((slots * batch, *init.shape[1:]), torch.float32).unflatten(0, (slots, batch))
        self.base = dense(init)
        self.row = 0
        self._skip()

    def _empty(self, shape, dtype):
        return torch.empty(shape, dtype=dtype, device=self._coef.device, memory_format=self._format)

    def _apply(self, row, row_index):
        made = [self._empty(self._shape, self._dtype if name == "in" else torch.float32) for name in self.plan.outputs]
        self._outputs = made
        super()._apply(row, row_index)
        self._buffers.update(zip(self.plan.outputs, made))
        self.base = self._buffers["x"]

    @property
    def base(self) -> torch.Tensor:
        """(B, ...): the latent, before the first row as it was given, then float32."""
        return self._x

    @base.setter
    def base(self, x: torch.Tensor):
        self._buffers["x"] = self._x = x
        self._inputs = [self._buffers.get(name, x) for name in self.plan.inputs]


def _shown(this: Run, denoised: torch.Tensor, callback, about: dict, slopes: bool) -> torch.Tensor:
    """Calls the callback; returns the estimate. What the callback writes into x and denoised counts where it does in
    k-diffusion: x is the base from here on, and a slope that was taken before stays what it was."""
    with torch.inference_mode(False):  # inference tensors do not count their versions
        x = this.model_input.clone()
    before = x._version
    callback({"x": x, **about, "denoised": denoised.clone() if slopes else denoised})
    if x._version != before:
        base = x.to(torch.float32, copy=True)
        if slopes:
            denoised = denoised + (base - this.base)
        this.base = base
    return denoised


@torch.no_grad()
def run(name: str, model, x: torch.Tensor, levels: Levels, extra_args, callback, disable, options: dict, noise: str, seeds,
        noise_sampler=None) -> torch.Tensor:
    """The latent after all steps, in x's dtype. name, options: of fastdiff's sampler; the rest as for the functions of
    ``k_diffusion``, which all end here."""
    _check(model, x, callback, noise, seeds, noise_sampler)
    extra_args = checked_arguments(extra_args)
    given = noise == "torch"
    made = draws = None
    options = {key: value if key in ("order", "solver_type") else number(key, value) for key, value in options.items()}
    for key in {"s_tmin", "s_tmax"} & set(options):  # compared with sigmas as torch compares a number: in their dtype
        options[key] = torch.tensor(options[key], dtype=torch.float64, device="cpu").to(levels.sigmas.dtype).item()
    if len(levels.values) > 1:
        made = _made(name, levels.values, tuple(sorted(options.items())), x.dtype, given)
    if given:
        draws = _Draws(name, x, levels, noise_sampler, options.get("r", 0.0))
    if made is None:
        return x
    table, start = made.plan, x.detach()
    if given and made.asked[0]:
        eps = draws(*made.asked[0])
        if made.lift:
            start = torch.add(start.float(), eps.float(), alpha=made.lift)
    this = Run(table, start, x.dtype, default_seeds(seeds, table.noises > 0))
    _loop(name, made, this, model, levels, extra_args, callback, disable, draws)
    return this.base.to(x.dtype)


def _loop(name, made: _Made, this: Run, model, levels: Levels, extra_args, callback, disable, draws: _Draws | None):
    """Every step of the run: its calls of the model, each followed by a row."""
    steps, fast, reads_noise = made.plan.steps.tolist(), levels.times is not None, "noise" in made.plan.inputs
    count, shape = steps[-1] + 1, this.base.shape
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_current("tqdm", tqdm)(total=len(levels.values) - 1, disable=disable)) if fast else None
        for i in range(count) if fast else _current("trange", trange)(count, disable=disable):
            shown = callback is None
            while not this.done and steps[this.row] == i:
                denoised = as_answer(_answered(this, model, extra_args, steps), shape, "the model")
                if fast:
                    bar.update()
                if not shown:
                    denoised = _shown(this, denoised, callback, levels.about(i, this.sigma), name in SLOPES)
                    shown = True
                asks = made.asked[this.row]
                noise = draws(*asks) if draws and asks else denoised
                this.step(denoised, *[noise] * reads_noise)


def _answered(this: Run, model, extra_args, steps):
    """What the model returns. What it writes into x counts where that is the base, as it does in k-diffusion; at the points
    inside of a step it is refused. torch counts no writes of inference mode."""
    x = this.model_input
    counted, before = not x.is_inference(), 0 if x.is_inference() else x._version
    answer = model(x, this.time, **extra_args)
    if counted and x._version != before:
        if this.row and steps[this.row - 1] == steps[this.row]:
            raise RuntimeError("the model wrote into x at a call inside of a step, which the step has yet to read: a model that "
                               "returns a new tensor is taken")
        this.base = x.to(torch.float32, copy=True)
    return answer


def _check(model, x, callback, noise, seeds, noise_sampler) -> None:
    if not callable(model):
        raise TypeError(f"model is {type(model).__name__}: something that can be called as model(x, sigma) is taken")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is {type(x).__name__}: a tensor is taken")
    if x.dtype not in FLOATS or x.layout != torch.strided:
        raise TypeError(f"x is {x.dtype} of layout {x.layout}: torch.float32, torch.float16 or torch.bfloat16, strided, is taken")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: (B, ...) with at least two dimensions is taken")
    if x.device.type not in BACKENDS:
        raise ValueError(f"x is on {x.device}: {', '.join(BACKENDS)} is taken")
    for what, value in (("callback", callback), ("noise_sampler", noise_sampler)):
        if value is not None and not callable(value):
            raise TypeError(f"{what} is {type(value).__name__}: something that can be called is taken")
    if noise not in NOISES:
        raise ValueError(unknown("noise", noise, NOISES))
    if noise == "philox" and noise_sampler is not None:
        raise ValueError("noise_sampler was given with noise='philox', which draws inside of the step: one of them is taken")
    if noise == "torch" and seeds is not None:
        raise ValueError("seeds were given with noise='torch', which draws from torch's generators: they go with noise='philox'")


def checked_arguments(extra_args) -> Mapping:
    """extra_args, a mapping by name; None: none."""
    if extra_args is None:
        return {}
    if not isinstance(extra_args, Mapping) or not all(isinstance(name, str) for name in extra_args):
        given = f"holds {list(extra_args)!r}" if isinstance(extra_args, Mapping) else f"is {type(extra_args).__name__}"
        raise TypeError(f"extra_args {given}: a dict of further arguments of the model, by name, is taken")
    return extra_args


def whole(name: str, value) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it takes an int") from None


def number(name: str, value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; it takes a number") from None
