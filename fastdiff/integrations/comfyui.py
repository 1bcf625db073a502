"""ComfyUI's samplers with a fused step.

    from fastdiff.integrations import comfyui

    x = comfyui.sample_dpmpp_2m_sde(model, x, sigmas, extra_args=extra_args, callback=callback, eta=0.8)

For every ``sample_*`` function of ``comfy/k_diffusion/sampling.py`` and ``comfy/extra_samplers/uni_pc.py`` but
``sample_dpm_adaptive`` there is one here with the same parameters, which calls the model and the callback as that function
does. ``register()`` adds them to ComfyUI's sampler list; ``integrations/comfyui`` is a custom node folder that does so.

Common to all: model: ComfyUI's, called as ``model(x, sigma, **extra_args)``, x (B, ...) as given, sigma (B,) in x's dtype;
returns the denoised estimate, so that guidance, hooks and masks act in it. x: float32, float16 or bfloat16, at the first
level; the result is of its dtype, the latent between is float32. sigmas: (steps + 1,), read once to the host. callback: gets
{"x", "i", "sigma", "sigma_hat", "denoised"}, tensors that nobody writes into later. A flow is a model whose sampling is
ComfyUI's CONST.

noise: "torch" asks ComfyUI's noise samplers, or the one given, as ComfyUI does, and hands the draws to the step: the same
pictures up to rounding. "philox" draws inside of the step: sample b from seed s + b, s = extra_args["seed"]; the SDE samplers
then follow fastdiff's own Brownian path.

A call that has no closed form here (levels that rise, an order beyond the ones known, float64) is ComfyUI's own function's,
and a warning says so once.

>>> def model(x, sigma):                                             # the exact denoiser of N(0, 1)
...     return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
>>> sigmas = torch.tensor([10.0, 5.0, 2.0, 0.5, 0.0])
>>> sample_dpmpp_2m(model, 10 * torch.randn(1, 4, 8, 8), sigmas, disable=True).shape
torch.Size([1, 4, 8, 8])
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
import warnings

import torch
from tqdm.auto import tqdm

from ..checks import FLOATS
from ..noise import default_seeds, unknown
from ..ops import BACKENDS
from ..samplers.stage import Noise
from .comfy_plans import FUNCTIONS, LAST_OF_UNIPC, NotFused, levels_of, made
from .comfy_stages import BASE, UNCOND
from .k_runs import NOISES, Run, as_answer, checked_arguments, number

__all__ = [*(f"sample_{name}" for name in FUNCTIONS), "NOISES", "draws", "listed", "register"]


# ---- ComfyUI


def _comfy(name: str):
    return importlib.import_module(f"comfy.{name}")


def _original(name: str):
    return getattr(_comfy("extra_samplers.uni_pc" if name.startswith("unipc") else "k_diffusion.sampling"), f"sample_{name}")


def _model_sampling(model, spec):
    """The model's sampling where the function looks at it: of the patcher, or of the model itself."""
    try:
        if spec.frame == "snr" and spec.stages != "lcm":
            return model.inner_model.model_patcher.get_model_object("model_sampling")
        return model.inner_model.inner_model.model_sampling if spec.flow or spec.stages == "lcm" else None
    except AttributeError as missing:
        raise TypeError(f"model is {type(model).__name__}: one of ComfyUI's is taken, which leads to its model_sampling "
                        f"({missing})") from None


# ---- the calls


def _function(name: str):
    """The fused function of a name."""
    spec = FUNCTIONS[name]

    def sample(*args, **kwargs):
        noise = kwargs.pop("noise", "torch") if spec.noise else "torch"
        if noise not in NOISES:
            raise ValueError(unknown("noise", noise, NOISES))
        bound = spec.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if noise == "philox" and bound.arguments.get("noise_sampler") is not None:
            raise ValueError("noise_sampler was given with noise='philox', which draws inside of the step: one of them is taken")
        try:
            ready = _Call(name, bound.arguments, noise)
        except NotFused as why:
            _say_once(name, str(why) + ("; its noise is torch's then" if noise == "philox" else ""))
            return _original(name)(*args, **kwargs)
        return ready.run()

    sample.__name__ = sample.__qualname__ = f"sample_{name}"
    sample.__signature__ = spec.signature
    sample.__doc__ = f"ComfyUI's ``sample_{name}`` with a fused step; ``noise`` is taken by keyword."
    return torch.no_grad()(sample)


@functools.cache
def _say_once(name: str, why: str) -> None:
    warnings.warn(f"sample_{name}: ComfyUI's own function is used, not the fused one: {why}", stacklevel=4)


class _Call:
    """One call of a function. Raises `NotFused` before anything is drawn or called."""

    def __init__(self, name: str, given: dict, noise: str):
        self.name, self.noise = _switched(name, given), noise
        self.spec = FUNCTIONS[self.name]
        self.model, self.x = given["model"], given[self.spec.latent]
        self.extra_args = dict(checked_arguments(given["extra_args"]))
        self.callback, self.disable = given["callback"], given["disable"]
        self.noise_sampler = given.get("noise_sampler")
        _check(self.model, self.x, given.get("sigmas", self.x), callback=self.callback, noise_sampler=self.noise_sampler)
        sampling = _model_sampling(self.model, self.spec)
        flow = sampling is not None and isinstance(sampling, _comfy("model_sampling").CONST)
        if flow and self.spec.flow:
            self.name, self.spec = self.spec.flow, FUNCTIONS[self.spec.flow]
        self.flow = flow or self.name.endswith("_RF")
        if self.spec.stages == "lcm":
            _check_noise_scaling(sampling)
        self.moves_last = False
        self.sigmas, self.grid = self._levels(given, sampling)
        options = {key: given[key] for key in self.spec.parameters if key in given and key != "noise_sampler"}
        for key in {"s_tmin", "s_tmax"} & options.keys():  # compared as torch compares a number with sigmas: in their dtype
            options[key] = torch.tensor(number(key, options[key]), dtype=torch.float64, device="cpu").to(self.sigmas.dtype).item()
        options = self.spec.options(options)
        if "tau_func" in options:
            options |= self._strength(options.pop("tau_func"), sampling)
        self.options, self.made = options, None
        if len(self.grid) > self.spec.least:
            levels = levels_of(self.grid, self.spec.frame, self.flow)
            self.made = made(self.name, levels, self.flow, tuple(sorted(options.items())), self.x.dtype, noise == "torch")
        elif self.spec.least > 1:
            raise NotFused(f"it takes {self.spec.least} steps or more")

    def _levels(self, given, sampling) -> tuple[torch.Tensor, list[float]]:
        """The levels as ComfyUI has them, and on the host."""
        if self.spec.stages == "dpm_fast":
            n, ends = given["n"], [float(given["sigma_max"]), float(given["sigma_min"])]
            if min(ends) <= 0:
                raise ValueError("sigma_min and sigma_max must not be 0")
            sigmas = torch.linspace(*(math.log(s) for s in ends), n // 3 + 2, dtype=torch.float64).exp().to(self.x)
            return sigmas, [ends[0] * (ends[1] / ends[0]) ** (k / n) for k in range(n)] + [ends[1]]
        self.whole = sigmas = given["sigmas"]
        grid = sigmas.tolist()
        if self.spec.offset and self.flow and len(grid) > 1 and grid[0] >= 1:
            sigmas = sigmas.clone()
            sigmas[0] = sampling.percent_to_sigma(1e-4)
            grid[0] = sigmas[0].item()
        self.moves_last = self.spec.stages == "unipc" and len(grid) > 1 and grid[-1] == 0
        if self.moves_last:
            grid[-1] = LAST_OF_UNIPC  # below float32's 0.001, where a scheduler ends by that and 0
        return sigmas, grid

    def _strength(self, tau_func, sampling) -> dict:
        """SA-Solver's tau by step, as a number and the levels between which steps with it start."""
        if tau_func is None:
            high, low = (sampling.percent_to_sigma(p) for p in (0.2, 0.8))
            strengths = [1.0 if high >= s >= low else 0.0 for s in self.grid[1:]]
        else:
            strengths = [float(tau_func(s)) if s > 0 else 0.0 for s in self.sigmas[1:]]
        taken = [i for i, tau in enumerate(strengths) if tau]
        lower_order_final = {"lower_order_final": self.grid[-1] == 0}
        if not taken:
            return {"tau": 0.0, **lower_order_final}
        if len({strengths[i] for i in taken}) > 1 or taken[-1] - taken[0] >= len(taken):
            raise NotFused("tau_func takes more than one value, or comes and goes")
        starts = levels_of(self.grid, self.spec.frame, self.flow)
        return {"tau": strengths[taken[0]], "s_tmin": starts[taken[-1]], "s_tmax": starts[taken[0]], **lower_order_final}

    # ---- the run

    def run(self) -> torch.Tensor:
        if self.made is None:
            return self.x
        if self.moves_last:
            self.sigmas[-1] = LAST_OF_UNIPC  # in the caller's tensor too, as ComfyUI's: its inverse noise scaling reads it
        self.held, self.uncond = {}, None
        if any(address.stream == UNCOND for address in self.made.last):
            self._watch_uncond()
        self.draw = self._noise_sampler() if self.noise == "torch" and self.made.draws else None
        start = self.x.detach()
        if self.draw and self.spec.noise == "like":
            self._draw_churn(0)
            if self.made.lift:
                start = torch.add(start.float(), self.held.pop(Noise("churn", 0)).float(), alpha=self.made.lift)
        this = Run(self.made.plan, start, self.x.dtype, self._seeds())
        steps, calls = self.made.plan.steps.tolist(), 0
        fast = self.spec.stages == "dpm_fast"
        with tqdm(total=len(self.grid) - 1 if fast else steps[-1] + 1, disable=self.disable) as bar:
            of_step = 0
            while not this.done:
                i, row = steps[this.row], this.row
                out = self._one(this, i, row, of_step, calls)
                calls += 1
                ended = this.done or steps[this.row] != i
                of_step = 0 if ended else of_step + 1
                if self.callback is not None and ended and self.spec.stages == "unipc":
                    scale = math.sqrt(1 + this.plan.sigmas_next[row] ** 2)
                    self.callback({"x": this.base / scale, "i": i, "denoised": out})
                if fast or ended:
                    bar.update()
        return this.base.to(self.x.dtype)

    def _one(self, this: Run, i: int, row: int, of_step: int, call: int) -> torch.Tensor:
        """A call of the model and the row after it. Returns the estimate."""
        base, point = this.base, this.model_input
        out = as_answer(self.model(point, this.time, **self.extra_args), base.shape, "the model")
        self.held |= {Noise(BASE, call): base, Noise(UNCOND, call): self.uncond}
        if self.callback is not None and of_step == 0 and self.spec.stages != "unipc":
            self.callback({"x": point, "i": i, "sigma": self.sigmas[i], "sigma_hat": this.time[0], "denoised": out})
        if self.draw:
            for address, start, end in self._asked(i, of_step, row, this):
                self.held[address] = self._drawn(start, end)
        taken = self.made.taken[row]
        unused = sum(name.startswith("noise") for name in this.plan.inputs) - len(taken)
        this.step(out, *(self.held[address] for address in taken), *[out] * unused)
        self.held = {address: t for address, t in self.held.items() if self.made.last.get(address, -1) > row}
        return out

    def _watch_uncond(self) -> None:
        """A hook after guidance that keeps the unconditional estimate."""

        def keep(args):
            self.uncond = as_answer(args["uncond_denoised"], self.x.shape, "the unconditional estimate")
            return args["denoised"]

        options = dict(self.extra_args.get("model_options", {}))
        with_hook = _comfy("model_patcher").set_model_options_post_cfg_function
        self.extra_args["model_options"] = with_hook(options, keep, disable_cfg1_optimization=True)

    # ---- noise, in ComfyUI's order

    def _seeds(self):
        draws = self.noise != "torch" and self.made.plan.noises > 0
        return default_seeds(self.extra_args.get("seed") if draws else None, draws)

    def _noise_sampler(self):
        if self.spec.noise == "like":
            return lambda start, end: torch.randn_like(self.x)
        if self.noise_sampler is not None:
            return self.noise_sampler
        sampling, seed = _comfy("k_diffusion.sampling"), self.extra_args.get("seed")
        if self.spec.noise == "default":
            return sampling.default_noise_sampler(self.x, seed=seed)
        whole = self.whole  # as ComfyUI: between the levels as they were given
        cpu = self.spec.noise == "tree"
        return sampling.BrownianTreeNoiseSampler(self.x, whole[whole > 0].min(), whole.max(), seed=seed, cpu=cpu)

    def _drawn(self, start, end) -> torch.Tensor:
        return as_answer(self.draw(start, end), self.x.shape, "the noise sampler")

    def _draw_churn(self, i: int) -> None:
        """What lifts the base before step i: ComfyUI's heunpp2 draws it in every step, the others where it has a weight."""
        address = Noise("churn", i)
        if address in self.made.last or (i == 0 and self.made.lift) or self.spec.stages == "heunpp2":
            self.held[address] = self._drawn(None, None)

    def _asked(self, i: int, of_step: int, row: int, this: Run):
        """The draws after a call: address, and the levels between which the noise is asked for."""
        ended = row + 1 == len(this.plan) or this.plan.steps[row + 1] != i
        stages = self.spec.stages
        if self.spec.noise == "like":
            if ended and i + 2 < len(self.grid):
                self._draw_churn(i + 1)
            return
        fast = stages == "dpm_fast"  # which has levels of its own, all above 0
        if (not fast and self.grid[i + 1] == 0) or (stages == "sa_solver" and Noise("step", i) not in self.made.taken[row]):
            return
        at = [self.sigmas[i], *self._inner(i), self.sigmas[i + 1]]
        if stages == "dpmpp_sde":
            yield Noise("step", 2 * i + of_step), at[0], at[of_step + 1]
        elif stages in ("seeds_2", "seeds_3"):
            yield Noise("step", (len(at) - 1) * i + of_step), at[of_step], at[of_step + 1]
        elif ended and Noise("step", i) not in self.held:
            yield Noise("step", i), *at

    def _inner(self, i: int) -> list[torch.Tensor]:
        """Levels inside of a step, computed as ComfyUI does: a Brownian tree tells apart what differs in its last bits."""
        places = {"dpmpp_sde": ("r",), "seeds_2": ("r",), "seeds_3": ("r_1", "r_2")}.get(self.spec.stages, ())
        if not places:
            return []
        ends = self.sigmas[i : i + 2]
        start, end = ends.logit().neg() if self.flow else ends.log().neg()
        inner = [start + r * (end - start) for r in (self.options[name] for name in places)]
        return [s.neg().sigmoid() if self.flow else s.neg().exp() for s in inner]


def _switched(name: str, given: dict) -> str:
    """Where an option names another function."""
    if name == "gradient_estimation" and given["cfg_pp"]:
        return "gradient_estimation_cfg_pp"
    return name


def _check(model, x, sigmas, **functions) -> None:
    if not callable(model):
        raise TypeError(f"model is {type(model).__name__}: something that can be called as model(x, sigma) is taken")
    for name, value in (("x", x), ("sigmas", sigmas)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is {type(value).__name__}: a tensor is taken")
    if sigmas is not x and (sigmas.ndim != 1 or not sigmas.is_floating_point()):
        raise ValueError(f"sigmas is {sigmas.dtype} of shape {tuple(sigmas.shape)}: floats (steps + 1,) are taken")
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} is {type(value).__name__}: something that can be called is taken")
    if x.dtype not in FLOATS or x.layout != torch.strided or x.ndim < 2 or x.device.type not in BACKENDS:
        raise NotFused(f"x is {x.dtype} of shape {tuple(x.shape)} on {x.device}")


def _check_noise_scaling(sampling) -> None:
    """LCM renoises by the model's own function: ours are those of x0 + sigma n and of a flow."""
    of_comfy = _comfy("model_sampling")
    known = [getattr(of_comfy, kind).noise_scaling for kind in ("EPS", "CONST", "COSMOS_RFLOW") if hasattr(of_comfy, kind)]
    if getattr(type(sampling), "noise_scaling", None) not in known:
        raise NotFused(f"{type(sampling).__name__} has a noise_scaling of its own")


for _name in FUNCTIONS:
    setattr(sys.modules[__name__], f"sample_{_name}", _function(_name))


# ---- ComfyUI's sampler list

PREFIX = "fastdiff_"
_UNIPC = {"uni_pc": "unipc", "uni_pc_bh2": "unipc_bh2"}  # ComfyUI's name in its list, and of the function


def listed() -> dict:
    """ComfyUI's names of samplers that are fused here, each with its function as a KSAMPLER calls it. A function of ComfyUI that
    has a parameter which is not known here is left out: it is not the one that was written down."""
    found = {}
    for name in _comfy("samplers").SAMPLER_NAMES:
        of_function = _UNIPC.get(name, name)
        spec = FUNCTIONS.get(of_function)
        if spec and set(inspect.signature(_original(of_function)).parameters) <= set(spec.signature.parameters):
            found[name] = _dpm_fast if name == "dpm_fast" else globals()[f"sample_{of_function}"]
    return found


def draws(name: str) -> bool:
    """Whether the sampler of a name in ComfyUI's list takes ``noise``: whether it may draw any. Raises ``ValueError`` for a name
    that is not known."""
    if _UNIPC.get(name, name) not in FUNCTIONS:
        raise ValueError(unknown("sampler", name, [*FUNCTIONS, *_UNIPC]))
    return FUNCTIONS[_UNIPC.get(name, name)].noise is not None


def _dpm_fast(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
    """dpm_fast between the levels at the ends, as ComfyUI's list has it."""
    if len(sigmas) <= 1:
        return x
    last = sigmas[-2] if sigmas[-1] == 0 else sigmas[-1]
    return globals()["sample_dpm_fast"](model, x, last, sigmas[0], len(sigmas) - 1, extra_args, callback, disable, **options)


def register(prefix: str = PREFIX) -> list[str]:
    """Adds the fused samplers to ComfyUI's list, ``prefix`` before each name; returns the names. Once more changes nothing.

    They are then in every node that offers samplers: KSampler, KSamplerSelect, SamplerCustom. Raises ``ValueError`` for an empty
    prefix: ComfyUI's own stay what they are.
    """
    if not isinstance(prefix, str) or not prefix:
        raise ValueError(f"prefix is {prefix!r}: text that sets the names apart from ComfyUI's own is taken")
    samplers, sampling = _comfy("samplers"), _comfy("k_diffusion.sampling")
    names = []
    for name, function in listed().items():
        if name.startswith(prefix):
            continue
        setattr(sampling, f"sample_{prefix}{name}", function)
        for known in (samplers.KSAMPLER_NAMES, samplers.SAMPLER_NAMES):
            if prefix + name not in known:
                known.append(prefix + name)
        if name in samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS:
            samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS.add(prefix + name)
        names.append(prefix + name)
    return names
