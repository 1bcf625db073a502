"""The sampling loops of OpenAI's guided-diffusion and improved-diffusion, fused.

    from fastdiff.integrations import guided_diffusion

    diffusion = guided_diffusion.fuse(diffusion)           # p_sample_loop and ddim_sample_loop are now these

Ancestral sampling (Ho et al. 2020, arXiv:2006.11239; with a learned variance: Nichol & Dhariwal 2021, arXiv:2102.09672) and
DDIM (Song et al. 2021, arXiv:2010.02502), for any object with the attributes of GaussianDiffusion, respaced ones included. Each
call of the network is followed by one row. What no row can compute is made beside it: see `_Beside`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..action import Acting, Action, Actions, Setting, checked_output
from ..noise import checked_shape, randn, stream_id, unknown
from ..ops import checked_device
from ..plan import Plan, Row
from ..stepper import Stepper
from .edm import NOISES, answer_of, is_number, listed, seeds_of, with_noise_given
from .guided_plans import Diffusion, plan_of, read, tables

__all__ = ["ddim_sample_loop", "ddim_sample_loop_progressive", "fuse", "p_sample_loop", "p_sample_loop_progressive"]


def p_sample_loop(diffusion, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                  device=None, progress=False, *, noise_mode="torch", seeds=None, steering=()) -> torch.Tensor:
    """Ancestral sampling, Ho et al. 2020, algorithm 2: GaussianDiffusion.p_sample_loop as a function.

        x_{t-1} = mu(x0, x_t) + Sigma grad + sqrt(Sigma) n,      mu = c1 x0 + c2 x_t (eq. 7),   grad = cond_fn(x_t, t)

    diffusion: has betas (T,), model_mean_type (EPSILON or START_X) and model_var_type, and where it is a respaced one,
    timestep_map, original_num_steps, rescale_timesteps. model: called as model(x, t, **model_kwargs), x (B, C, ...) float32, t
    (B,) as the original gives it; returns (B, C, ...), with a learned variance (B, 2 C, ...). shape: (B, C, ...).
    noise: (B, C, ...), x_T; None: drawn. clip_denoised: the estimate x0 to [-1, 1]; denoised_fn: what it goes through
    before. cond_fn: called as cond_fn(x, t, **model_kwargs), returns grad log p(y | x_t) (Dhariwal & Nichol 2021,
    algorithm 1). device: None for that of the model's parameters, or of noise; progress: show a bar.

    noise_mode: "torch": one torch.randn_like at every step, the last included, as in the original: the same pictures up to
    rounding. "philox": sample b from its own seed. seeds: (B,), or one int s for s, s + 1, ..., of "philox" and of steering
    that draws; None: s comes from torch's default generator with "philox", and is 0 with "torch". steering: actions, as
    ``fd.sample`` takes them, on the estimate before it is clipped.

    Returns (B, C, ...) float32. Raises ``ValueError``/``TypeError`` before the model is called, ``FloatingPointError`` for a
    NaN.
    """
    return _last(_loop("ddpm", kept=False, **locals()))


def ddim_sample_loop(diffusion, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                     device=None, progress=False, eta=0.0, *, noise_mode="torch", seeds=None, steering=()) -> torch.Tensor:
    """DDIM, Song et al. 2021, eq. 12: GaussianDiffusion.ddim_sample_loop as a function. A learned variance plays no part.

    cond_fn: its gradient moves the score, and by it the estimate, after it was clipped:
    x0 += (1 - abar) / sqrt(abar) grad (Dhariwal & Nichol 2021, algorithm 2). eta: 0 for no noise, 1 for about that of DDPM. The
    rest as `p_sample_loop`.
    """
    return _last(_loop("ddim", kept=False, **locals()))


def p_sample_loop_progressive(diffusion, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                              model_kwargs=None, device=None, progress=False, *, noise_mode="torch", seeds=None, steering=()):
    """`p_sample_loop` step by step: yields {"sample": x_{t-1}, "pred_xstart": x0}, (B, C, ...) float32. What is written into
    "sample", or put in its place, is where the next step begins."""
    return _dicts(_loop("ddpm", kept=True, **locals()))


def ddim_sample_loop_progressive(diffusion, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                                 model_kwargs=None, device=None, progress=False, eta=0.0, *, noise_mode="torch", seeds=None,
                                 steering=()):
    """`ddim_sample_loop` step by step, as `p_sample_loop_progressive`."""
    return _dicts(_loop("ddim", kept=True, **locals()))


LOOPS = (p_sample_loop, ddim_sample_loop, p_sample_loop_progressive, ddim_sample_loop_progressive)


def fuse(diffusion, noise: str = "torch", seeds=None, steering: Sequence[Action] = ()):
    """The same diffusion, with fused loops.

    diffusion: a GaussianDiffusion, or a SpacedDiffusion. A copy is returned, an instance of its class, whose p_sample_loop,
    ddim_sample_loop and their progressive forms, with the parameters that they have there, are those of this module.
    noise, seeds, steering: of every loop, as noise_mode, seeds and steering of `p_sample_loop`.

    A few of its own steps are taken and compared with the fused ones. Raises ``ValueError`` where they differ, as in a class
    that changes p_mean_variance, where a loop has parameters that are not known here, and for ModelMeanType.PREVIOUS_X;
    ``TypeError`` for what is no diffusion.
    """
    if noise not in NOISES:
        raise ValueError(unknown("noise", noise, NOISES))
    read(diffusion)
    parent = getattr(type(diffusion), "_fastdiff_parent", type(diffusion))
    fused = object.__new__(_fused_class(parent))
    fused.__dict__.update(diffusion.__dict__)
    fused._fastdiff = {"noise_mode": noise, "seeds": seeds, "steering": steering}
    _check_steps(fused)
    return fused


@functools.cache
def _fused_class(parent: type) -> type:
    names = {"_fastdiff_parent": parent, **{name: getattr(parent, name) for name in ("__module__", "__qualname__", "__doc__")}}
    for function in LOOPS:
        name = function.__name__
        if not callable(getattr(parent, name, None)):
            raise TypeError(f"diffusion is {parent.__name__}, without {name}: a GaussianDiffusion is taken")
        names[name] = _method(getattr(parent, name), function)
    return type(parent.__name__, (parent,), names)


def _method(original: Callable, function: Callable) -> Callable:
    signature = inspect.signature(original)
    own = set(inspect.signature(function).parameters)
    more = [name for name in list(signature.parameters)[1:] if name not in own]
    if more:
        raise ValueError(f"{original.__qualname__} takes {', '.join(more)}, which the fused loop does not know: the parameters "
                         "of guided-diffusion's are taken")

    @functools.wraps(original)
    def loop(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        return function(self, **dict(list(given.items())[1:]), **self._fastdiff)

    return loop


def _check_steps(diffusion) -> None:
    """Raises unless the class's own steps are those of the rows, at three timesteps: t, sample and estimate."""
    T, learned = len(diffusion.betas), read(diffusion).variance.startswith("LEARNED")
    x = torch.linspace(-2, 2, 96, device="cpu").view(2, 3, 4, 4)

    def model(x, t):
        out = torch.sin(3 * x + t.view(-1, 1, 1, 1))
        return torch.cat([out, out.flip(1)], 1) if learned else out

    for sampler, name in (("ddpm", "p_sample"), ("ddim", "ddim_sample")):
        for t in sorted({0, T // 2, T - 1}):
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.default_generator.manual_seed(t)  # torch.manual_seed would seed GPUs too
                theirs = getattr(diffusion, name)(model, x, torch.tensor([t, t], device="cpu"))
                torch.default_generator.manual_seed(t)
                ours = next(_dicts(_loop(sampler, diffusion, model, x.shape, kept=True, noise=x, first=T - 1 - t)))
            for key in ("sample", "pred_xstart"):
                off = float((theirs[key] - ours[key]).norm() / theirs[key].norm())
                if not off < 1e-3:
                    raise ValueError(f"{type(diffusion).__name__}.{name} is not guided-diffusion's: at t = {t} its {key} is "
                                     f"another, by {off:.3g} of its norm, and cannot be fused")


# ---- the loop


def _loop(sampler, diffusion, model, shape, *, kept, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
          model_kwargs=None, device=None, progress=False, eta=0.0, noise_mode="torch", seeds=None, steering=(),
          first=0) -> Iterator[Stepper]:
    """Checks everything, and returns a generator over the run after each step. kept: whether its estimate is kept; first: the
    row to begin with."""
    about, shape = read(diffusion), checked_shape(shape, 2)
    _check(model, shape, noise, denoised_fn, cond_fn, model_kwargs, eta, noise_mode)
    device = checked_device(_device(model, noise, device))
    network = _Network(model, about, shape, denoised_fn, dict(model_kwargs or {}), device)
    seeds = seeds_of(seeds, noise_mode, shape[0])
    prediction = "sample" if denoised_fn else about.mean
    made = plan_of(about.betas, about.times, prediction, about.variance, sampler, bool(clip_denoised), float(eta))
    like = _drawn_like(shape, noise, device) if noise_mode == "torch" else None
    actions = [*listed(steering), _Beside(network, about, sampler, cond_fn, like, kept)]

    @torch.no_grad()
    def begun(acting: Actions) -> Stepper:
        start = noise
        if start is None and noise_mode == "torch":
            start = torch.randn(*shape, device=device)
        elif start is None:
            start = randn(shape, seeds=seeds, stream="init", device=device)
        run = Stepper(acting.plan, shape, seeds, device=device, init=start, **acting.bank)
        run.row = first
        return run

    def rounds():
        from tqdm.auto import tqdm

        with (Actions(actions, made, shape, network, device=device) as acting,
              tqdm(total=acting.plan.evaluations, disable=not progress) as bar):
            run = begun(acting)
            while not run.done:
                with torch.no_grad():  # not around the yield: what the caller computes there is the caller's
                    run.step(*acting.outputs(run))
                bar.update()
                yield run
            run.check()

    return rounds()


def _last(runs: Iterator[Stepper]) -> torch.Tensor:
    *_, run = runs
    return run.x


def _dicts(runs: Iterator[Stepper]) -> Iterator[dict[str, torch.Tensor]]:
    """What the original yields. It goes on from out["sample"], whatever the caller has made of it."""
    for run in runs:
        out = {"sample": run.x.clone(), "pred_xstart": run.denoised().clone()}
        yield out
        with torch.no_grad():
            run.x.copy_(out["sample"])


def _check(model, shape, noise, denoised_fn, cond_fn, model_kwargs, eta, noise_mode) -> None:
    for name, value in (("model", model), ("denoised_fn", denoised_fn), ("cond_fn", cond_fn)):
        if not callable(value) and (value is not None or name == "model"):
            raise TypeError(f"{name} is {type(value).__name__}: something that can be called is taken")
    if model_kwargs is not None and not isinstance(model_kwargs, dict):
        raise TypeError(f"model_kwargs is {type(model_kwargs).__name__}: a dict is taken")
    if not all(isinstance(name, str) for name in model_kwargs or ()):
        raise TypeError(f"model_kwargs holds {list(model_kwargs)!r}: a dict of further arguments of the model, by name, is taken")
    if not is_number(eta) or not 0 <= eta < math.inf:
        raise ValueError(f"eta is {eta!r}: a finite number of 0 or more is taken")
    if noise_mode not in NOISES:
        raise ValueError(unknown("noise_mode", noise_mode, NOISES))
    if noise is not None and not isinstance(noise, torch.Tensor):
        raise TypeError(f"noise is {noise!r}: the first latent, a tensor of shape {shape}, is taken; noise_mode says how noise "
                        "is drawn")
    if noise is not None and tuple(noise.shape) != shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}: {shape} is taken")


def _drawn_like(shape, noise, device) -> torch.Tensor:
    """What torch draws like: the latent as the original has it, in the strides of noise, and in float64 where that is."""
    if noise is None:
        return torch.empty(shape, device=device)
    return torch.empty_like(noise, dtype=torch.float64 if noise.dtype == torch.float64 else torch.float32, device=device)


def _device(model, noise, device):
    if device is not None:
        return device
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    if parameter is None and noise is None:
        raise TypeError(f"device is None, and the model ({type(model).__name__}) has no parameters that say where it is: a "
                        "device is taken")
    return noise.device if parameter is None else parameter.device


class _Network(torch.nn.Module):
    """The model as a plan's model. A module, so that steering finds the network's blocks in it.

    With a learned variance, what it says about it stays in `values`. With a denoised_fn, which is no part of a row, the estimate
    is made here and is what the plan takes as the output.
    """

    def __init__(self, model, about: Diffusion, shape, denoised_fn, arguments, device):
        super().__init__()
        self.model, self.arguments, self.denoised_fn, self._whole = model, arguments, denoised_fn, about.whole
        self.values: torch.Tensor | None = None
        self._channels = shape[1]
        self._twice = (shape[1] * 2, *shape[2:]) if about.variance.startswith("LEARNED") else None
        self._from = None
        if denoised_fn is not None and about.mean == "epsilon":
            abar = np.cumprod(1 - np.frombuffer(about.betas))
            weights = np.stack([1 / np.sqrt(abar), -np.sqrt(1 / abar - 1)])
            self._from = torch.tensor(weights, dtype=torch.float32, device=device).view(2, -1, *(1,) * (len(shape) - 1))
            self._times = torch.tensor(about.times, dtype=torch.float32, device=device)

    def time(self, time: torch.Tensor) -> torch.Tensor:
        """(B,): the plan's time as the model is given it."""
        return time.long() if self._whole else time

    def forward(self, x, time):
        out = answer_of("the model", self.model, x, self.time(time), **self.arguments)
        if self._twice is not None:
            out, self.values = checked_output(out, (len(x), *self._twice)).split(self._channels, 1)
        if self.denoised_fn is None:
            return out
        if self._from is not None:
            t = torch.searchsorted(self._times, time.contiguous())
            out = self._from[0, t] * x + self._from[1, t] * out
        return checked_output(self.denoised_fn(out), x.shape, "denoised_fn")


class _Beside(Acting):
    """What a row reads beside the model's output, made in the original's order, and what it writes beside the next base.

    like: what torch draws like, None where it does not draw.
    Inputs: "noise", drawn by torch at every step; "grad", of cond_fn. A learned variance Sigma = (e^b e^(a v))^2 is a tensor and
    so no coefficient: in place of both there is "added" = e^(a v) (n + e^b e^(a v) grad), with the weight e^b. Output:
    "denoised", the estimate, where it is kept. The last of the actions, so that it sees the rows as they will be.
    """

    def __init__(self, network: _Network, about: Diffusion, sampler, cond_fn, like: torch.Tensor | None, kept: bool):
        self._network, self._sampler, self._cond_fn, self._like, self._kept = network, sampler, cond_fn, like, kept
        self._learned = sampler == "ddpm" and about.variance.startswith("LEARNED")
        self._tables, self._of = tables(about.betas, about.variance), {time: t for t, time in enumerate(about.times)}
        self._keys = None

    def begin(self, setting: Setting) -> Acting:
        made = setting.plan
        own = ("added",) * self._learned or ("grad",) * (self._cond_fn is not None)
        self._t = [self._of[row.time] for row in made.rows]
        self.plan = made
        if own or self._kept:
            rows = [self._written(row, t) for row, t in zip(made.rows, self._t)]
            self.plan = Plan.from_rows(rows, inputs=(*made.inputs, *own), outputs=made.outputs + ("denoised",) * self._kept,
                                       ring=made.ring, bank=made.bank, name=made.name, info=made.info)
        if self._like is not None:
            self.plan = with_noise_given(self.plan)
        self._inputs = self.plan.inputs[len(made.inputs) :]
        return self

    def _written(self, row: Row, t: int) -> Row:
        """The row with what is added to x_{t-1}, in the units that the row writes: those of x_t where an action repeats it."""
        abar, variance, spread, _ = (table[t] for table in self._tables)
        units = row.base_scale / (math.sqrt(self._tables.abar[t - 1]) if t else 1.0)
        base, estimate = dict(row.y[0]), {"d": 1.0}
        if self._learned:
            base["added"] = units * spread
        elif self._cond_fn is not None and self._sampler == "ddpm":
            base["grad"] = units * variance
        elif self._cond_fn is not None:
            estimate["grad"] = (1 - abar) / math.sqrt(abar)
            base["grad"] = base.get("d", 0.0) * estimate["grad"]
        return replace(row, y=(base, estimate) if self._kept else (base,))

    def outputs(self, run, evaluate):
        self._network.values = None
        outputs, made, t = evaluate(), {}, self._t[run.row]
        make = {"noise": self._noise, "grad": self._gradient}
        for name in ("noise", "grad") if self._sampler == "ddpm" else ("grad", "noise"):
            made[name] = make[name](run, t)
        if self._learned:
            made["added"] = self._spread_out(run, t, made["noise"], made["grad"])
        return (*outputs, *(made[name] for name in self._inputs))

    def _gradient(self, run, t):
        if self._cond_fn is None:
            return None
        gradient = answer_of("cond_fn", self._cond_fn, run.x.detach(), self._network.time(run.time), **self._network.arguments)
        return checked_output(gradient, run.x.shape, "cond_fn").float()

    def _noise(self, run, t):
        if self._like is not None:
            return torch.randn_like(self._like).float()
        if not self._learned or t == 0:  # in the row, or not read
            return None
        if self._keys is None:
            draws = torch.arange(len(self._t), device=run.x.device).view(-1, 1)
            streams = torch.full_like(draws, stream_id("step"))
            self._keys = torch.ops.fastdiff.run_keys(run.seeds.to(run.x.device), streams, draws)[:, 0]
        noise = torch.empty_like(run.x)
        torch.ops.fastdiff.normal_(noise, self._keys[run.row])
        return noise

    def _spread_out(self, run, t, noise, gradient):
        values = self._network.values
        if values is None:
            raise RuntimeError("an action calls another network in place of the model, so that the learned variance is not "
                               "known: ddim_sample_loop is taken, which does without")
        if t == 0:
            noise = torch.zeros_like(run.x)
            if gradient is None:
                return noise
        spread = torch.mul(values.detach(), float(self._tables.rate[t])).float().exp_()
        if gradient is not None:
            noise.addcmul_(spread, gradient, value=float(self._tables.spread[t]))
        return noise.mul_(spread)
