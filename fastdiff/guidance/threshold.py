"""Dynamic thresholding of the estimate, by a quantile of its own sizes, as an action."""

import math
from dataclasses import dataclass, replace
from numbers import Real

import torch

from ..action import Acting, Setting
from ..plan import Plan, Row
from ..steering.window import fresh_name, rows_in
from ..thresholding import bounded_row
from .products import readable

__all__ = ["DynamicThreshold", "Thresholding", "dynamic_threshold"]


def dynamic_threshold(ratio: float = 0.995, maximum: float | None = None,
                      window: tuple[float, float] | None = None) -> "DynamicThreshold":
    """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3), for any plan that keeps estimates.

        d = clip(d, -s, s) / s,    s the ``ratio``-quantile of |d| of the sample, at least 1 and at most ``maximum``

    ratio: 0 to 1, as diffusers' dynamic_thresholding_ratio; maximum: 1 or more, as its sample_max_value; None: no limit, as in
    the paper. window: (low, high), noise levels sigma; None: all.

    It acts on the estimate with all that actions before it make of it; vectors of the bank (``NoiseAlignment``,
    ``LatentVector``) are added after it. `cfg_rescale` and the others of its kind, `cfg_pp`, concepts and guidance by gradients
    come before it in steering. Before the row, the estimate is written in float32, s is found without a sort (``quantile_``: four
    passes that read it), and it is bounded in place; the row reads it in place of the model's output.

    Raises ``ValueError``/``TypeError`` before the model is called for what does not fit: plans that mix slopes (lms, deis, ...)
    unless they are made with clip_denoised, among others.

    >>> import fastdiff as fd
    >>> plan = fd.plan("ddim", schedule="scaled_linear", steps=10)
    >>> fd.sample(lambda x, t: 0.5 * x, plan, (2, 1, 8, 8), seeds=0, steering=[dynamic_threshold(0.9)]).abs().max() <= 1
    tensor(True)
    """
    return DynamicThreshold(ratio, maximum, window)


@dataclass(frozen=True, eq=False)
class DynamicThreshold:
    """What `dynamic_threshold` returns: an action."""

    ratio: float = 0.995
    maximum: float | None = None
    window: tuple[float, float] | None = None

    def begin(self, setting: Setting) -> Acting:
        return Thresholding(setting, self.ratio, self.maximum, self.window)


class Thresholding(Acting):
    """Dynamic thresholding at work. The row's d is the tensor that `factors` fills, once all that the row reads is there."""

    scales = True  # called with the factors of the actions before it; it has none of its own

    def __init__(self, setting: Setting, ratio, maximum, window):
        plan = setting.plan
        self._acts = rows_in(plan, window)
        self._ratio, self._most = _number("ratio", ratio, 0, 1), math.inf
        if maximum is not None:
            self._most = _number("maximum", maximum, 1, math.inf)
        _check_place(setting, self._acts)
        rows = plan.rows
        self._name = fresh_name("thresholded", plan)
        read = {s for row, acts in zip(rows, self._acts) if acts for s in row.d if not s.startswith("bank")}
        self._slots = [slot for slot in plan.slots if slot in read]
        renamed = {slot: f"v{k}" for k, slot in enumerate(self._slots)}  # slots of the ring are plain inputs here
        own = [Row(d={renamed[s]: c for s, c in row.d.items() if s in renamed} if acts else {}, y=({"d": 1.0},))
               for row, acts in zip(rows, self._acts)]
        self._sum = self._table(own, tuple(renamed.values()), setting.device)
        self._bounded = bounded_row(setting.device)
        self._clip = torch.empty(setting.size, 3, dtype=torch.float32, device=setting.device)
        self._estimate = torch.empty(setting.size, *setting.shape[1:], dtype=torch.float32, device=setting.device)
        self._scaled = any(acting.scales for acting in setting.acting)
        made = [replace(row, d={self._name: 1.0, **{s: c for s, c in row.d.items() if s not in renamed}}) if acts else row
                for row, acts in zip(rows, self._acts)]
        self.plan = Plan.from_rows(made, inputs=(*plan.inputs, self._name), outputs=plan.outputs, ring=plan.ring, bank=plan.bank,
                                   noises=plan.noises, name=plan.name, info=plan.info)

    @staticmethod
    def _table(rows, inputs, device):
        return [torch.from_numpy(t).to(device) for t in Plan.from_rows(rows, inputs=inputs, outputs=("y",)).table()]

    def outputs(self, run, evaluate):
        self._check_after(run.plan)
        return (*evaluate(), self._estimate)

    def _check_after(self, plan: Plan) -> None:
        if "uncond" in plan.inputs and "uncond" not in self.plan.inputs:
            raise ValueError("an action after dynamic_threshold brings guidance by a second output (classifier_free, or a concept "
                             "with a scale), which the thresholded estimate would not have: put it before")
        for name in plan.inputs[len(self.plan.inputs) :]:
            if plan.coef[self._acts, plan.slots.index(name)].any():
                raise ValueError(f"an action after dynamic_threshold adds to the estimate (an input {name!r}), which would not "
                                 "be thresholded: put it before")

    def factors(self, run, given, scale):
        if not self._acts[run.row]:
            return
        with torch.no_grad():
            inputs = [readable(self._tensor(run, given, slot)) for slot in self._slots]
            scales = torch.stack([scale[self._here(run, slot)] for slot in self._slots], 1) if self._scaled else None
            op, d, nothing = torch.ops.fastdiff, self._estimate, (None,) * 3
            coef, meta = self._bounded
            op.step_(inputs, [d], None, *self._sum, None, run.row, None, scales, *nothing, None, *nothing)
            op.quantile_(None, self._clip, [d], coef, None, 0, None, self._ratio, 1.0, self._most)
            op.step_([d], [d], None, coef, meta, None, 0, None, None, *nothing, self._clip, *nothing)

    def _here(self, run, slot: str) -> str:
        """The slot's name in the run: what a 16-bit model's input is carried as."""
        return "carry" if slot == "in" and "in" not in run.plan.inputs else slot

    def _tensor(self, run, given, slot: str) -> torch.Tensor:
        if slot.startswith("ring"):
            return run._ring[int(slot.removeprefix("ring"))]
        return given[slot] if slot in given else run._buffers[self._here(run, slot)]


def _number(name: str, value, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        taken = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number of {low:g} or more"
        raise ValueError(f"{name} is {value!r}: {taken} is taken")
    return float(value)


def _check_place(setting: Setting, acts) -> None:
    plan = setting.plan
    if any(isinstance(acting, Thresholding) for acting in setting.acting):
        raise ValueError("dynamic_threshold was given twice: it is taken once")
    if not math.prod(setting.shape[1:]):
        raise ValueError(f"shape is {setting.shape}: a quantile is of samples with at least one element")
    if plan.offsets[acts].any():
        raise ValueError(f"the plan ({plan.name!r}) keeps slopes, not estimates, whose sizes are thresholded: one made with "
                         "clip_denoised=(-1, 1) keeps estimates")
