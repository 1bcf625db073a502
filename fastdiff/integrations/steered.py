"""Actions inside the steps of a fused scheduler.

An action says what it adds to the denoised estimate, d += u. With d = a x + b m, m being the model's output, that is the
model's output m + u / b, at the level at which the model was called. So in a probed row m is replaced by that sum, wherever it
stands: in what the step returns, in what the scheduler keeps for later steps, and before a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..action import Actions
from ..checks import dense
from ..guidance import Arithmetic, CfgPp, ClassifierFree, DynamicThreshold, TrainingFree
from ..steering.inject import Injection
from ..steering.window import rows_in
from . import rows
from .calls import BASIS, Signature
from .levels import levels_of, plan_of
from .probing import Node, Row
from .rows import Steer
from .runs import OWN, Run
from .state import same
from .timesteps import Unusual, host_time

__all__ = ["Steered", "SteeredSteps", "checked"]

_BANK = ("bank", "bank_index", "bank_weight")
_COMBINED = ("takes the conditional and the unconditional output, which a pipeline has combined already when the scheduler "
             "steps: fd.sample takes it")
_REFUSED = {
    TrainingFree: "differentiates through the network, which a pipeline has called already when the scheduler steps: fd.sample "
    "takes it",
    ClassifierFree: "evaluates networks by itself: a pipeline's own guidance_scale does, and fd.sample takes it",
    DynamicThreshold: "limits the estimate: a scheduler does so by itself with thresholding=True, and fd.sample takes it",
    Arithmetic: _COMBINED,
    CfgPp: _COMBINED,
}


def checked(steering) -> tuple:
    """Actions, as a tuple. Raises ``TypeError`` for what is none, or cannot act in a scheduler's step."""
    actions = [steering] if hasattr(steering, "begin") else steering
    if not isinstance(actions, Sequence) or not all(callable(getattr(a, "begin", None)) for a in actions):
        kinds = ", ".join(type(a).__name__ for a in actions) if isinstance(actions, Sequence) else type(actions).__name__
        raise TypeError(f"steering is {kinds}: a list of actions is taken, such as alignment.at(...), concept.at(...)")
    for action in actions:
        for kind, reason in _REFUSED.items():
            if isinstance(action, kind):
                raise TypeError(f"steering has {kind.__name__}, which {reason}")
    return tuple(actions)


class _Output:
    """The model, as actions may call it: what a pipeline has called it for already."""

    value: torch.Tensor

    def __call__(self, x, time):
        return self.value


class _Now:
    """The call of the model that was just made, with the names of a ``Stepper``."""

    def __init__(self, plan):
        self.plan, self.row, self.x = plan, 0, None

    @property
    def model_input(self) -> torch.Tensor:
        return self.x

    @property
    def time(self) -> torch.Tensor:
        return torch.full((len(self.x),), float(self.plan.times[self.row]), device=self.x.device)

    @property
    def sigma(self) -> float:
        return float(self.plan.sigmas[self.row])


class Steered:
    """What acts on one run of a scheduler. actions: all of them; those on activations take part in the checks only.

    node: the scheduler after ``set_timesteps``; order: calls of a step.
    Raises ``ValueError`` for a window that no level of the schedule lies in, and for a scheduler whose levels are not known.
    """

    def __init__(self, actions: Sequence, node: Node, signature: Signature, order: int):
        (self.levels, clip), self.times = levels_of(node, signature), node.times
        self._about = node.parent.__name__, order, clip
        self.plan = self._plan(0)
        for action in actions:
            if hasattr(action, "window") or hasattr(action, "steps"):
                rows_in(self.plan, getattr(action, "window", None), getattr(action, "steps", None))
        self._in_step = [action for action in actions if not isinstance(action, Injection)]
        self._tables = _tables(node)
        self._actions: Actions | None = None
        self._output = _Output()
        self._start: int | None = None
        self._like: tuple | None = None  # shape and device that the actions have begun with
        self.next = 0

    def __deepcopy__(self, memo):
        """The actions begin anew in the copy."""
        twin = object.__new__(Steered)
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__, _actions=None, _output=_Output())
        return twin

    def fits(self, node: Node) -> bool:
        """Whether the levels are still those of the scheduler: somebody may have set others since."""
        return self._start is not None or all(same(a, b) for a, b in zip(self._tables, _tables(node)))

    def _plan(self, start: int):
        name, order, clip = self._about
        return plan_of(name, self.levels, self.times, order, clip, start)

    def place(self, scheduler, time) -> int:
        """Which of the timesteps a step is at. time: a function that gives the timestep, for a scheduler that does not count."""
        attributes = vars(scheduler)
        for known in (attributes.get("_step_index"), attributes.get("_begin_index")):
            if known is not None:
                return known
        time = time()
        if self.next < len(self.times) and self.times[self.next] == time:
            return self.next
        places = [place for place, t in enumerate(self.times) if t == time]
        if not places:
            raise ValueError(f"timestep {time} is none of scheduler.timesteps: with steering, one of them is taken")
        return places[1 if "_step_index" in attributes and len(places) > 1 else 0]  # as index_for_timestep chooses

    def nearest(self, scheduler, time) -> int:
        """Which of the timesteps a network is called for: pipelines hand it in half precision too, or as a share of all. time: a
        function that gives it, or None."""

        def known():
            value = time()
            if value is None or value in self.times:
                return value
            whole = scheduler.config.get("num_train_timesteps", 1000)
            near = min(self.times, key=lambda t: min(abs(t - value), abs(t - whole * value)))
            close = min(abs(near - value), abs(near - whole * value)) <= abs(near) / 128
            return near if close else value

        return self.place(scheduler, known)

    # ---- before the first step

    def begin(self, place: int, sample: torch.Tensor) -> None:
        """The actions' own checks, once the latents are there: a batch of another shape begins them anew."""
        like = sample.shape, sample.device
        if self._actions is not None and self._start <= place and self._like == like:
            return
        self.close()
        self._start = place if self._start is None else min(place, self._start)
        self.plan = self._plan(self._start)
        made = Actions(self._in_step, self.plan, sample.shape, self._output, device=sample.device, dtype=sample.dtype)
        try:
            self._weights = self._read(made)
        except BaseException:
            made.close()
            raise
        self._actions, self._now, self._like = made, _Now(made.plan), like

    def _read(self, made: Actions) -> list[tuple | None]:
        """What the actions have put in place of the model's output, by row: its own weight, those of more tensors, those of the
        bank's vectors. None where that is the output alone."""
        plan, bare = made.plan, self.plan
        more = range(len(bare.inputs), len(plan.inputs))
        bank = slice(plan.layout.inputs, plan.layout.inputs + plan.bank)
        alike = plan.inputs[: more.start] == bare.inputs and plan.outputs == bare.outputs and not plan.ring
        if not alike or not set(made.bank) <= set(_BANK) or _but_for_d(plan) != _but_for_d(bare):
            raise ValueError("an action changes more of a step than its denoised estimate: it cannot act in a scheduler's step; "
                             "fd.sample takes it")
        found = []
        for weights, level in zip(plan.coef, self.levels):
            weights = (weights / level.of_output if level.of_output else 0 * weights).tolist()  # without noise d is x itself
            one, extras, vectors = weights[1], tuple(weights[more.start : more.stop]), tuple(weights[bank])
            found.append((one, extras, vectors) if any(extras) or any(vectors) or one not in (0.0, 1.0) else None)
        return found

    # ---- in the run

    def steer(self, place: int, output: int) -> Steer | None:
        """What stands for the model's output in a step. output: its slot."""
        weights = self._weights[place]
        return None if weights is None else Steer(output, *weights)

    def outputs(self, place: int, sample: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, list, tuple]:
        """The model's output, tensors for the slots from ``BASIS`` on, and the bank, all for this step."""
        self._output.value = output
        self._now.row, self._now.x = place, sample
        try:
            output, *extras = self._actions.outputs(self._now)
        finally:
            self._output.value = self._now.x = None
        bank = self._actions.bank
        return output, list(map(dense, extras)), tuple(map(bank.get, _BANK))

    def whole_output(self, place: int, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The steered output as a tensor, for a step that is not fused. Channels beyond the sample's, as of a learned variance,
        stay as they are."""
        self.begin(place, sample)
        steer = self.steer(place, 0)
        if steer is None:
            return output
        head = output if output.shape == sample.shape else output[:, : sample.shape[1]]
        if head.shape != sample.shape:
            raise ValueError(f"model_output has shape {tuple(output.shape)}, sample {tuple(sample.shape)}: with steering the "
                             "shape of sample is taken, or more channels")
        head, extras, bank = self.outputs(place, dense(sample), dense(head))
        row = _output_alone(head.dtype)
        values = [head, *[None] * (BASIS - 1), *extras]
        (head,) = rows.apply(rows.ready(row, False, head.device, steer), values, head, None, bank)
        return head if output.shape == sample.shape else torch.cat([head, output[:, sample.shape[1] :]], 1)

    def taken(self, place: int) -> bool:
        """A step was taken. Returns whether it was the last one."""
        self.next = place + 1
        if self.next >= len(self.times):
            self.close()
        return self.next >= len(self.times)

    def close(self) -> None:
        made, self._actions = self._actions, None
        if made is not None:
            made.close()


class SteeredSteps:
    """What a fused scheduler has for its actions."""

    def _fastdiff_steered(self, run: Run) -> Steered | None:
        """What acts on the run. Raises ``ValueError`` for windows outside of the schedule."""
        actions = self.__dict__.get(OWN + "steering")
        if not actions:
            return None
        steered = self.__dict__.get(OWN + "acting")
        if steered is None or not steered.fits(run.node):
            steered = Steered(actions, run.node, self._fastdiff_signature, getattr(self, "order", 1))
            self.__dict__[OWN + "acting"] = steered
            injected = self.__dict__.get(OWN + "injected")
            if injected is not None:
                injected.begin(self, steered.plan, _place_of_call)
        elif OWN + "injected" in self.__dict__:
            self.__dict__[OWN + "injected"].check(self)
        return steered

    def _fastdiff_taken(self, steered: Steered, place: int) -> None:
        if steered.taken(place):
            self._fastdiff_end_injected()

    def _fastdiff_end_injected(self) -> None:
        injected = self.__dict__.get(OWN + "injected")
        if injected is not None:
            injected.end(self)

    def _fastdiff_end(self) -> None:
        """What acted on the run before acts no more."""
        steered = self.__dict__.pop(OWN + "acting", None)
        if steered is not None:
            steered.close()
            self._fastdiff_end_injected()


def _place_of_call(scheduler, timestep) -> int:
    """Which of the timesteps the network is called for."""
    run, steered = (scheduler.__dict__[OWN + name] for name in ("run", "acting"))

    def time():
        try:
            return host_time(scheduler, run.node, timestep)[1]
        except Unusual:  # a copy for each sample, which has to be read
            return timestep.reshape(-1)[0].item()

    return steered.nearest(scheduler, time)


def _but_for_d(plan) -> list:
    """A plan's rows without what is added to d."""
    return [replace(row, d={"x": row.d.get("x", 0.0)}) for row in plan.rows]


def _tables(node: Node) -> tuple:
    return node.attributes.get("timesteps"), node.attributes.get("sigmas")


def _output_alone(dtype: torch.dtype) -> Row:
    """The row that returns the model's output."""
    return Row(1, 0, 1, (), None, (), None, np.eye(1, BASIS), (dtype,), (), (), None, 0.0)
