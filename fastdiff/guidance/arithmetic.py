"""Guidance arithmetic: what can be made of a conditional and an unconditional output beside their weighted sum.

With out_c and out_u the network's outputs, D = out_c - out_u, w the guidance scale of the plan's row; all of one sample:

    CFG              out_u + w D
    cfg_rescale      g (1 - phi + phi std(out_c) / std(g)),    g: what the row makes of the outputs
    cfg_zero_star    w out_c + (1 - w) s out_u,    s = <out_c, out_u> / |out_u|^2;    0 in the first steps
    apg              C + (w - 1) (m - (1 - eta) <m, C> / |C|^2 C),    C = out_c or its x0, m = D limited in norm, with momentum
    perp_neg         out_u + w (D - neg_scale (N - <N, D> / |D|^2 D)),    N = out_n - out_u of a negative prompt

Each is a sum of the row's inputs, with factors made of inner products. So it costs a pass that writes two combinations of the
outputs in float32 (`step_`), a reduction (`project_`) and arithmetic on (B,) numbers; the row then multiplies its terms by the
factors (s_bk in ``fastdiff/reference/step.py``). Nothing waits for the device. Sums have a fixed order, and every operation on
(B,) numbers is rounded once: a sample's bits do not depend on the batch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real

import numpy as np
import torch

from ..action import Acting, Setting
from ..noise import unknown
from ..plan import Plan
from ..steering.amplify import Injecting
from ..steering.window import fresh_name, per_sample, rows_in
from .cfg_pp import Renoising
from .products import Pair
from .threshold import Thresholding
from .travel import weights_of_input

__all__ = ["Arithmetic", "apg", "cfg_rescale", "cfg_zero_star", "perp_neg"]

TINY = 1e-30
"""What a sum of squares is divided by where it is 0: a projection on nothing is 0."""
SPACES = ("denoised", "output")


def cfg_rescale(phi=0.7, window: tuple[float, float] | None = None) -> "Arithmetic":
    """Rescaled guidance (Lin et al. 2023, arXiv:2305.08891, equations 15 and 16), for a plan with guidance.

        out = phi g std(out_c) / std(g) + (1 - phi) g,    g = out_u + w (out_c - out_u)

    std over the elements of a sample, of what the network predicts, as diffusers' ``rescale_noise_cfg``. After `cfg_zero_star`,
    `apg` or `perp_neg` in steering, g is what they make of the outputs; each then has its pass and its reduction.
    phi: 0 to 1, a number or one a sample; 0 changes no bit. window: (low, high), noise levels sigma; None: all.

    A plan has guidance from ``plan.with_guidance(w)``, where the model returns (conditional, unconditional), or from
    `classifier_free` with one scale for all samples, before this in steering. A row whose w is 0 or 1 reads one of the outputs
    and stays as it is. Raises ``ValueError``/``TypeError`` before the model is called for what does not fit.

    >>> import fastdiff as fd
    >>> plan = fd.plan("euler", schedule="edm", prediction="denoised", steps=10).with_guidance(7.5)
    >>> model = lambda x, sigma: (0.9 * x / (1 + sigma.view(-1, 1, 1, 1) ** 2), x / (1 + sigma.view(-1, 1, 1, 1) ** 2))
    >>> fd.sample(model, plan, (2, 1, 8, 8), seeds=0, steering=[cfg_rescale(0.7)]).shape
    torch.Size([2, 1, 8, 8])
    """
    return Arithmetic(_Rescale, window, {"phi": phi})


def cfg_zero_star(zero_steps: int = 1, window: tuple[float, float] | None = None) -> "Arithmetic":
    """CFG-Zero* (Fan et al. 2025, arXiv:2503.18886), for a plan with guidance (see `cfg_rescale`).

        v = w v_c + (1 - w) s v_u,    s = <v_c, v_u> / |v_u|^2         and v = 0 in the first ``zero_steps`` steps

    zero_steps: with all their stages; 0: none. The zero is a velocity's: prediction="flow" is taken. There the model is not
    called, unless an action before this one has to see it. window: where s acts, noise levels sigma; None: all.
    Raises as `cfg_rescale`.
    """
    return Arithmetic(_ZeroStar, window, {"zero_steps": zero_steps})


def apg(threshold=None, eta=0.0, momentum: float = 0.0, window: tuple[float, float] | None = None, *,
        of: str = "denoised") -> "Arithmetic":
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416), for a plan with guidance (see `cfg_rescale`).

        D = D_c + (w - 1) (m_perp + eta m_par),    m_par = <m, D_c> / |D_c|^2 D_c,  m_perp = m - m_par
        m = min(1, threshold / |M|) M,    M = D_c - D_u + momentum M',  M' of the call before

    threshold: r, above 0; a norm over the elements of a sample (diffusers takes 15 by default, ComfyUI 5); None: no limit. eta:
    of the part along the conditional estimate, 1 as in CFG. Both: numbers, or one a sample. momentum: beta, one number between
    -1 and 1, below 0 in the paper. window: (low, high), noise levels sigma; M begins anew at the first call in it.
    of: "denoised": D are the estimates of x0, as in the paper and in ComfyUI; "output": what the network predicts, as in
    diffusers.

    Where the estimate holds a part of x, that is one more input of the row; momentum is one more, float32, in place of out_u.
    It is kept by the action: ``Stepper.gather``, ``clone`` and ``save`` do not know of it. Without a limit, with eta 1 and
    without momentum no bit changes. Raises as `cfg_rescale`.
    """
    return Arithmetic(_Projected, window, {"threshold": threshold, "eta": eta, "momentum": momentum, "of": of})


def perp_neg(neg_scale=1.0, window: tuple[float, float] | None = None) -> "Arithmetic":
    """Perpendicular negative prompts (Armandpour et al. 2023, arXiv:2304.04968), for a plan from ``plan.with_guidance(w)``.

        out = out_u + w (P - neg_scale (N - <N, P> / |P|^2 P)),    P = out_c - out_u,  N = out_n - out_u

    As ComfyUI's PerpNegGuider, whose inner products go over the whole batch; here they are a sample's. The model returns
    (conditional, unconditional, negative), unconditional being that of an empty prompt. It is taken first in steering.
    neg_scale: 0 or more, a number or one a sample; 0 changes no bit. window: (low, high), noise levels sigma; None: all.
    Raises as `cfg_rescale`.
    """
    return Arithmetic(_PerpNeg, window, {"neg_scale": neg_scale})


@dataclass(frozen=True, eq=False)
class Arithmetic:
    """What `cfg_rescale`, `cfg_zero_star`, `apg` and `perp_neg` return: an action."""

    method: Callable[..., Acting]
    window: tuple[float, float] | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def begin(self, setting: Setting) -> Acting:
        return self.method(setting, self.window, **self.options)


# ---- plans


def _rewritten(plan: Plan, change: Callable[[int, float], Mapping[str, float]], *names: str) -> Plan:
    """The plan with more inputs, and in every combination of row r that reads the outputs, with c in all, the weights of
    change(r, c): in d, and where a row reads the outputs past d's bounds."""

    def changed(r, terms):
        whole = terms.get("out", 0.0) + terms.get("uncond", 0.0)
        return {**terms, **change(r, whole)} if whole else terms

    rows = [replace(row, d=changed(r, row.d), y=tuple(changed(r, terms) for terms in row.y)) for r, row in enumerate(plan.rows)]
    return Plan.from_rows(rows, inputs=(*plan.inputs, *names), outputs=plan.outputs, ring=plan.ring, bank=plan.bank,
                          noises=plan.noises, name=plan.name, info=plan.info)


# ---- at work


class _Arithmetic(Acting):
    """acts: (N,) bool, the rows in which it does. For rows that mix the outputs, whole, (N,), is the weight of both in d, and w,
    (N,), the guidance scale. parts: the inputs that the guided output is a sum of."""

    scales = True

    def __init__(self, setting: Setting, window):
        self.plan = plan = setting.plan
        self._batch, self._device = setting.shape[0], setting.device
        self._each: dict[str, torch.Tensor] = {}  # numbers by sample, of all samples
        if any(isinstance(acting, Injecting) for acting in setting.acting):
            raise ValueError("a concept stands before guidance arithmetic in steering: put it after, where it acts on all "
                             "outputs")
        if "uncond" not in plan.inputs:
            raise ValueError(f"the plan ({plan.name!r}) has no guidance: one from plan.with_guidance(w), whose model returns "
                             "(conditional, unconditional), is taken, or classifier_free with one scale for all samples before "
                             "this in steering")
        if any(isinstance(acting, Renoising) for acting in setting.acting):
            raise ValueError("cfg_pp stands before this in steering: the factors of cfg_rescale, cfg_zero_star, apg and perp_neg "
                             "would act on the unconditional noise too, and are not taken together with it")
        if any(isinstance(acting, Thresholding) for acting in setting.acting):
            raise ValueError("dynamic_threshold stands before guidance arithmetic in steering, which acts on the model's outputs: "
                             "put it after")
        self.earlier = [acting for acting in setting.acting if isinstance(acting, _Arithmetic)]
        if self.earlier and not isinstance(self, _Rescale):
            raise ValueError("one of cfg_zero_star, apg and perp_neg is taken, and cfg_rescale after it")
        out, uncond = self._column("out"), self._column("uncond")
        self.whole, self.parts = out + uncond, ("out", "uncond")
        self.w = np.divide(out, self.whole, where=self.whole != 0, out=np.zeros(len(plan)))
        self._inside = rows_in(plan, window)
        self.acts = self._inside & (out != 0) & (uncond != 0)

    def _column(self, name: str) -> np.ndarray:
        """(N,) the weight of an input in d."""
        return self.plan.coef[:, self.plan.slots.index(name)]

    def _check_acts(self) -> None:
        if not self.acts.any():
            raise ValueError(f"no row of the plan ({self.plan.name!r}) in the window reads both outputs: guidance scales of 0 and "
                             "1 read one, steps that are set to 0 none")

    def _per_sample(self, name: str, value, low: float = -math.inf, high: float = math.inf) -> bool:
        """Keeps one number a sample. Returns whether any is not 0."""
        each = per_sample(value, self._batch, name)
        if bool((each < low).any()) or bool((each > high).any()):
            taken = f"numbers from {low:g} to {high:g} are" if high < math.inf else f"{low:g} or more is"
            raise ValueError(f"{name} holds {float(each.min()):g} to {float(each.max()):g}: {taken} taken")
        self._each[name] = each
        return bool(each.any())

    def select(self, index):
        self._here = {name: each[index].to(self._device) for name, each in self._each.items()}

    def outputs(self, run, evaluate):
        if any(name.startswith("guide") for name in run.plan.inputs[len(self.plan.inputs) :]):
            raise ValueError("guidance by gradients takes its estimate from the plan's weights, without factors: put it before "
                             "guidance arithmetic in steering")
        return evaluate()

    def factors(self, run, given, scale):
        if self.acts[run.row]:
            with torch.no_grad():
                self._multiply(run.row, given, scale)


class _Rescale(_Arithmetic):
    def __init__(self, setting, window, phi):
        super().__init__(setting, window)
        if any(isinstance(acting, _Rescale) for acting in self.earlier):
            raise ValueError("cfg_rescale was given twice: it is taken once")
        self.scales = self._per_sample("phi", phi, 0, 1)
        if self.earlier:
            self.whole, self.parts = self.earlier[0].whole, self.earlier[0].parts
        self._scaled = any(acting.scales for acting in self.earlier)
        weights = {name: self._column(name) for name in self.parts}
        others = np.any([weights[name] != 0 for name in self.parts if name != "out"], axis=0)
        self.acts = self._inside & (weights["out"] != 0) & others
        self._check_acts()
        rows = [({"cond": 1.0}, {name: float(weights[name][r] / self.whole[r]) for name in self.parts}) if acts else None
                for r, acts in enumerate(self.acts)]
        self._pair = Pair(setting, ("cond", *self.parts), rows, [(0, Pair.MEAN), (1, Pair.MEAN)])
        self._one = torch.ones(setting.size, device=setting.device)

    def select(self, index):
        super().select(index)
        self._rest = 1 - self._here["phi"]

    def _multiply(self, row, given, scale):
        before = torch.stack([self._one, *(scale[name] for name in self.parts)], 1) if self._scaled else None
        squares, means = self._pair(row, {**given, "cond": given["out"]}, before).unbind(2)
        of_conditional, of_guided = (squares - means * means).clamp(min=0).unbind(0)
        ratio = torch.where(of_guided > 0, (of_conditional / of_guided).sqrt(), self._one)  # what does not vary stays
        factor = self._here["phi"] * ratio + self._rest
        for name in self.parts:
            scale[name].mul_(factor)


class _ZeroStar(_Arithmetic):
    def __init__(self, setting, window, zero_steps):
        super().__init__(setting, window)
        plan, steps = self.plan, int(self.plan.steps.max()) + 1
        if isinstance(zero_steps, bool) or not hasattr(zero_steps, "__index__") or not 0 <= zero_steps < steps:
            raise ValueError(f"zero_steps is {zero_steps!r}: an int from 0 to {steps - 1}, less than the plan's steps, is taken")
        self._zero = np.zeros(len(plan), bool)
        if zero_steps:
            if plan.info.get("prediction", "flow") != "flow":
                raise ValueError(f"zero_steps is {zero_steps}, and the network predicts {plan.info['prediction']!r}: what is set "
                                 "to 0 is a velocity, so that prediction='flow' is taken, or zero_steps=0")
            self._zero = rows_in(plan, steps=(0, zero_steps - 1))
            self.plan = _rewritten(plan, lambda r, c: {"out": 0.0, "uncond": 0.0} if self._zero[r] else {})
        self.acts &= ~self._zero
        self._check_acts()
        self._unread = 0 if setting.acting else sum(name not in ("x", *plan.outputs) for name in plan.inputs)
        rows = [({"uncond": 1.0}, {"out": 1.0}) if acts else None for acts in self.acts]
        self._pair = Pair(setting, ("out", "uncond"), rows, [(0, 1)])

    def outputs(self, run, evaluate):
        if self._zero[run.row] and self._unread:
            return super().outputs(run, lambda: (run.x,) * self._unread)  # not read in this row
        return super().outputs(run, evaluate)

    def _multiply(self, row, given, scale):
        square, product = self._pair(row, given)[0].unbind(1)
        scale["uncond"].mul_(product / square.clamp(min=TINY))


class _Projected(_Arithmetic):
    def __init__(self, setting, window, threshold, eta, momentum, of):
        super().__init__(setting, window)
        if of not in SPACES:
            raise ValueError(unknown("of", of, SPACES))
        if isinstance(momentum, bool) or not isinstance(momentum, Real) or not -1 < momentum < 1:
            raise ValueError(f"momentum is {momentum!r}: one number between -1 and 1 is taken")
        self._per_sample("eta", eta)
        self._limited = threshold is not None
        if self._limited:
            self._per_sample("threshold", threshold)
            least = float(self._each["threshold"].min()) if self._batch else 1.0
            if least <= 0:
                raise ValueError(f"threshold holds {least:g}: numbers above 0 are taken, or None for no limit")
        self._check_acts()
        self.scales = self._limited or bool(momentum) or not bool((self._each["eta"] == 1).all())
        self._momentum = self._own = None
        if self.scales:
            self._begin(setting, float(momentum), of)

    def _begin(self, setting, momentum, of):
        """Guidance is of C = unit (out_c + own x), unit being 1 for outputs."""
        plan, N = self.plan, len(self.plan)
        unit = np.where(self.acts, self.whole, 1.0) if of == "denoised" else np.ones(N)
        own = np.where(self.acts, weights_of_input(plan) / unit, 0.0) if of == "denoised" else np.zeros(N)
        self._reads_base = plan.model_input == "x"
        slots, begun = ["out", "uncond"], np.cumsum(self.acts) > 1
        if momentum:
            self._momentum = fresh_name("momentum", plan)
            slots.append("first")
        if own.any():
            self._own = fresh_name("own", plan)
            slots.append("own")
        rows = [None] * N
        for r in np.flatnonzero(self.acts):
            u, before = float(unit[r]), {"first": momentum} if momentum and begun[r] else {}
            rows[r] = ({"out": u, "uncond": -u, **before}, {"out": u, **({"own": u * own[r]} if self._own else {})})

        def change(r, whole):
            if not self.acts[r]:
                return {}
            more = (self.w[r] - 1) * whole
            kept = {"out": whole, "uncond": 0.0, self._momentum: more / unit[r]} if momentum else {}
            return {**kept, **({self._own: -more * own[r]} if self._own else {})}

        self.parts += tuple(name for name in (self._momentum, self._own) if name)
        self.plan = _rewritten(plan, change, *self.parts[2:])
        self._pair = Pair(setting, tuple(slots), rows, [(0, 1), (1,)])

    def outputs(self, run, evaluate):
        more = () if self._momentum is None else (self._pair.first,)
        if self._own is not None:
            more += (run.x if self._reads_base else run.model_input,)
        return (*super().outputs(run, evaluate), *more)

    def select(self, index):
        super().select(index)
        self._less = 1 - self._here["eta"]

    def _multiply(self, row, given, scale):
        w = float(self.w[row])
        own = {} if self._own is None else {"own": given[self._own]}
        products = self._pair(row, {**given, **own})
        along = products[0, :, 1] / products[1, :, 0].clamp(min=TINY) * self._less
        limit = 1.0
        if self._limited:
            limit = (self._here["threshold"] / products[0, :, 0].sqrt()).clamp(max=1)
            along = along * limit
        if self._own is not None:
            scale[self._own].mul_(along)
        if self._momentum is not None:
            scale["out"].mul_(1 - (w - 1) * along)
            scale[self._momentum].mul_(limit)
        else:
            scale["out"].mul_(1 + (limit - along - 1) * ((w - 1) / w))
            scale["uncond"].mul_(limit)


class _PerpNeg(_Arithmetic):
    def __init__(self, setting, window, neg_scale):
        super().__init__(setting, window)
        if setting.acting:
            raise ValueError("the model of perp_neg returns (conditional, unconditional, negative), of which actions before it "
                             "do not know: it is taken first in steering, with guidance from plan.with_guidance(w)")
        self.scales = self._per_sample("neg_scale", neg_scale, 0)
        self.acts = self._inside & (self.w != 0)
        self._check_acts()
        negative = fresh_name("negative", self.plan)

        def change(r, whole):
            if not (self.scales and self.acts[r]):
                return {}
            # Where w is 1 the row does not read out_u, which now has a weight.
            return {negative: -self.w[r] * whole, **({"uncond": whole} if self.w[r] == 1 else {})}

        self._negative, self.parts = negative, (*self.parts, negative)
        self.plan = _rewritten(self.plan, change, negative)
        rows = [({"out": 1.0, "uncond": -1.0}, {negative: 1.0, "uncond": -1.0}) if acts else None for acts in self.acts]
        self._pair = Pair(setting, self.parts, rows, [(0, 1)])

    def _multiply(self, row, given, scale):
        w, s = float(self.w[row]), self._here["neg_scale"]
        square, product = self._pair(row, given)[0].unbind(1)
        along = product / square.clamp(min=TINY)
        scale["out"].mul_(1 + s * along)
        rest = s * (1 - along)
        scale["uncond"].mul_(rest if w == 1 else 1 + rest * (w / (1 - w)))
        scale[self._negative].mul_(s)
