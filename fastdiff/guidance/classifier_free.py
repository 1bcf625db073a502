"""Classifier-free guidance (Ho & Salimans 2022): a conditional network against an unconditional one."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ..action import Acting, Setting, checked_output
from ..graphs import as_outputs
from ..steering.window import rows_in
from .gradient import as_target, check_call, counts, fit, split_strength

__all__ = ["ClassifierFree", "classifier_free"]


def classifier_free(
    conditional_model: Callable[..., torch.Tensor],
    target,
    scale=2.0,
    window: tuple[float, float] | None = None,
    *,
    outside: float = 1.0,
    null=None,
) -> "ClassifierFree":
    """Classifier-free guidance, for ``fd.sample(unconditional_model, ..., steering=[...])``.

        out = out_u + scale (out_c - out_u)          in the model's own prediction; for epsilon: eps_u + w (eps_c - eps_u)

    conditional_model: called as conditional_model(x, time, y) with what fd.sample's model gets and the targets y; returns
    what the plan's prediction says. fd.sample's own model is the unconditional one.
    target: a label, one a sample, or a tensor (B, ...); scale: w: 0 is the unconditional model, 1 the conditional one; one
    number enters the row's coefficients and costs nothing (`Plan.with_guidance`), one a sample costs a pass over the outputs.
    window: (low, high), the noise levels sigma at which it acts; outside: the scale elsewhere, 1 as in Kynkaanniemi et al.
    2024 (guidance in a limited interval), or 0. Where a scale is exactly 0 or 1 only one of the models is called.
    null: the label that stands for no condition. With it both outputs come from one call of conditional_model with 2B
    samples, and fd.sample's model is not called where both are needed.

    Raises ``ValueError``/``TypeError`` before the model is called for what does not fit. `counts` of what it returns:
    evaluations in the last run; a call with 2B samples counts as two.
    """
    return ClassifierFree(conditional_model, target, scale, window, outside, null)


@dataclass(eq=False)
class ClassifierFree:
    """What `classifier_free` returns: the action, and how often networks were evaluated in its last run."""

    conditional_model: Callable[..., torch.Tensor]
    target: object
    scale: object = 2.0
    window: tuple[float, float] | None = None
    outside: float = 1.0
    null: object = None
    counts: dict[str, int] = field(default_factory=counts, init=False)

    def begin(self, setting: Setting) -> Acting:
        return _ClassifierFree(self, setting)


class _ClassifierFree(Acting):
    def __init__(self, action: ClassifierFree, setting: Setting):
        check_call("conditional_model", action.conditional_model, "x", "time", "y")
        batch, plan = setting.shape[0], setting.plan
        if action.target is None:
            raise TypeError("target is None: a label, one a sample, or a tensor (B, ...) is taken")
        if "uncond" in plan.inputs:
            raise ValueError("the plan has guidance already, or an amplified concept before this (an input \"uncond\"): "
                             "classifier-free guidance is taken once, and before concepts")
        if action.null is not None and setting.acting:
            raise ValueError("null= calls the conditional model in place of fd.sample's, on which an action before this one may "
                             "act: put classifier_free first in steering, or leave null out")
        self._model, self.counts = action.conditional_model, action.counts
        self._targets = as_target(action.target, batch)
        self._null = None if action.null is None else as_target(action.null, batch)
        if self._null is not None and self._null.shape != self._targets.shape:
            raise ValueError(f"null has shape {tuple(self._null.shape)}, the targets have {tuple(self._targets.shape)}: one of "
                             "the same shape is taken, for labels an int")
        factor, self._each = split_strength(action.scale, batch, "scale")
        outside, _ = split_strength(action.outside, batch, "outside")
        if torch.as_tensor(action.outside).ndim:
            raise TypeError(f"outside is {action.outside!r}: one number is taken")
        rows = rows_in(plan, action.window)
        self._row_scale = np.where(rows, factor, outside) if self._each is None else np.where(rows, np.nan, outside)
        self._fused = self._each is None
        # Scales by sample are mixed before the row; then the row reads one output only.
        self.plan = plan.with_guidance(np.where(plan.calls_model, self._row_scale, 1.0)) if self._fused else plan
        self._before = bool(setting.acting)
        self._device = setting.device
        self.counts.update(counts())

    def select(self, index):
        def part(values):
            return None if values is None else values[index.to(values.device)].to(self._device)

        self._target, self._no_target, self._scale = part(self._targets), part(self._null), part(self._each)

    def outputs(self, run, evaluate):
        w = self._row_scale[run.row]
        needs_conditional, needs_unconditional = w != 0, w != 1
        rest = ()
        if needs_conditional and needs_unconditional and self._null is not None:
            conditional, unconditional = self._both(run)
        else:
            if needs_unconditional or self._before:
                unconditional, *rest = evaluate()
                self.counts["network_forward"] += 1
            if needs_conditional:
                conditional = self._conditional(run.model_input, run.time, self._target)
                self.counts["network_forward"] += 1
        if self._fused:  # what a row does not read may be any tensor of the right shape
            return (conditional if needs_conditional else run.x, *rest, unconditional if needs_unconditional else run.x)
        if not needs_conditional or not needs_unconditional:
            return (conditional if needs_conditional else unconditional, *rest)
        scale = fit(self._scale, unconditional)
        mixed = torch.lerp(unconditional.float(), conditional.float(), scale)
        return torch.where(scale == 0, unconditional.float(), mixed), *rest

    def _both(self, run):
        """Both outputs from one call: the conditional ones first."""
        twice = (torch.cat([v, v]) for v in (run.model_input, run.time))
        out = self._conditional(*twice, torch.cat([self._target, self._no_target]))
        self.counts["network_forward"] += 2
        return out[: len(run.x)], out[len(run.x) :]

    def _conditional(self, x, time, y):
        outputs = as_outputs(self._model(x, time, y))
        if len(outputs) != 1:
            raise ValueError(f"conditional_model returned {len(outputs)} outputs: one tensor is taken")
        return checked_output(outputs[0], x.shape, "conditional_model")
