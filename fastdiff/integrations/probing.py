"""The row of a foreign scheduler's step, found by running that step.

A step of nearly every scheduler is a linear combination, with one scalar per tensor, of the latent, the model output, what
the scheduler kept of earlier steps, and noise; some clip the estimate in between. So the scheduler's own step is run
on tiny tensors in float64. Their first places hold basis vectors, from which the coefficients are read; the others hold
random numbers, on which the row must reproduce what the step returned. A second run, on larger tensors, must give the same
coefficients. What does not pass raises ``NotLinear``.

Nothing global is changed: draws and clips are seen by a ``TorchFunctionMode``, which belongs to the calling thread.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from .calls import (
    BASIS,
    TOLERANCE,
    VALUES,
    Brownian,
    Call,
    Clip,
    Draw,
    NotLinear,
    Watch,
    read,
    thresholds_by_quantile,
    vector,
)
from .state import Slot, filled, frozen, holds_slots, mapped, same

__all__ = ["Node", "Row", "opened", "root"]

SIZE = 3.0  # of the tensors in the second of two passes


@dataclass
class Row:
    """What one step does. Slots: the arguments of the latent's shape, what was kept, noises, and last the clipped estimate.

    targets: (n, BASIS) coefficients of what is returned (``returned`` dtypes), then of what is kept (``kept`` dtypes);
    origin: of the slots that are kept after it: ("argument", slot), ("kept", slot), ("noise", slot) or ("target", n);
    slots: how many there are in all; clip: None, or the clip of the estimate; build: makes the return value of a list of
    tensors.
    """

    arguments: int
    states: int
    slots: int
    draws: tuple[Draw, ...]
    asked: tuple[float, float] | None  # the two levels between which the draw before these was asked for, if it was Brownian
    noise_slots: tuple[int, ...]
    clip: Clip | None
    targets: np.ndarray
    returned: tuple[torch.dtype, ...]
    kept: tuple[torch.dtype, ...]
    origin: tuple[tuple[str, int], ...]
    build: object
    residual: float
    ready: dict = field(default_factory=dict)  # see rows.ready
    along: object = None  # see paths.Along

    @property
    def thresholds(self) -> bool:
        return self.clip is not None and self.clip.quantile is not None


class _Pass(NamedTuple):
    returned: list
    build: object
    attributes: dict
    watch: Watch
    addresses: list[int]  # of the arguments of the latent's shape

    def latents(self) -> list[torch.Tensor]:
        """What was returned, and what is kept in the attributes."""
        found = list(self.returned)
        _collect(self.attributes, self.watch.shape, found)
        return found


class Node:
    """A scheduler of a class in one state: its attributes, with ``Slot`` where a run keeps a tensor.

    dtypes: of the kept tensors, as the scheduler itself would keep them. In place of a Brownian tree (`noise_sampler`) stand
    the two levels between which it was last asked for noise. What follows from it is found once.
    """

    def __init__(self, parent: type, method: str, attributes: dict, dtypes: tuple = ()):
        self.parent, self.method, self.attributes, self.dtypes = parent, method, attributes, dtypes
        self._edges: dict = {}
        self.levels = None  # see levels.levels_of
        times = attributes.get("timesteps")
        self.times = times.tolist() if isinstance(times, torch.Tensor) and times.ndim == 1 else []
        self.held = [name for name, value in attributes.items() if holds_slots(value)]

    def __deepcopy__(self, memo):
        return self  # never changed, only grown

    @property
    def counted(self) -> int | None:
        """The place of the next step, where the scheduler itself counts."""
        index = self.attributes.get("_step_index")
        return index if isinstance(index, int) else None

    def ready_for(self, call: Call) -> dict:
        """Where the row of a call is ready already, see ``rows.ready``; nothing where it was not found yet."""
        edge = self._edges.get(call)
        return edge[0].ready if isinstance(edge, tuple) else {}

    def advance(self, call: Call) -> tuple[Row, Node, dict]:
        """The row of a call, the state after it, and the attributes that it changed or that hold slots. Raises ``NotLinear``,
        or what the scheduler raises."""
        edge = self._edges.get(call)
        if edge is None:
            try:
                edge = self._probe(call)
            except NotLinear as error:
                edge = str(error)  # not the error itself, which would keep the tensors of whoever meets it
            if len(self._edges) >= 4096:  # a state that any timestep leaves as it is, and no end of timesteps
                self._edges.clear()
            self._edges[call] = edge
        if isinstance(edge, str):
            raise NotLinear(edge)
        return edge

    def changed(self, name: str, value, dtypes: tuple) -> Node:
        """The state once somebody has set an attribute; dtypes: of all kept tensors then."""
        key = "set", name, frozen(value), dtypes
        if key not in self._edges:
            self._edges[key] = Node(self.parent, self.method, {**self.attributes, name: value}, dtypes)
        return self._edges[key]

    def _run(self, call: Call, exact: bool, size: float = 1.0) -> _Pass:
        """The step in float64, or in the dtypes that it is called with, on all inputs times size."""
        first = len(call.tensors)
        watch = Watch(first + len(self.dtypes), call.ndim, torch.Generator(), size)
        dtypes = [torch.float64 if exact else dtype for _, dtype in call.tensors]
        kept = [vector(first + i, call.ndim, torch.float64 if exact else dtype, size) for i, dtype in enumerate(self.dtypes)]
        shadow = object.__new__(self.parent)
        shadow.__dict__.update(filled(self.attributes, kept))
        if "noise_sampler" in self.attributes:
            shadow.__dict__["noise_sampler"] = Brownian(watch, dtypes[0])
        thresholds = "_internal_dict" in self.attributes and shadow.config.get("thresholding")
        if thresholds and not thresholds_by_quantile(shadow):
            raise NotLinear("its dynamic thresholding is another one")
        if thresholds:
            shadow.__dict__["_threshold_sample"] = watch.threshold(shadow.config)
        elsewhere = torch.get_default_device().type != "cpu"
        device = torch.device("cpu") if elsewhere else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), device, watch:
            arguments = call.arguments(watch.given, dtypes, size)
            out = getattr(self.parent, self.method)(shadow, **arguments)
        after = dict(shadow.__dict__)
        after.pop("_threshold_sample", None)
        if "noise_sampler" in self.attributes:
            queries = [draw.between for draw in watch.draws if draw.how == "brownian"]
            after["noise_sampler"] = tuple(map(float, queries[-1])) if queries else self.attributes["noise_sampler"]
        returned, build = opened(out, watch.shape)
        return _Pass(returned, build, after, watch, [arguments[name].data_ptr() for name, _ in call.tensors])

    def _probe(self, call: Call):
        exact, typed = self._run(call, True), self._run(call, False, SIZE)
        single = all(dtype == torch.float32 for dtype in (*self.dtypes, *(dtype for _, dtype in call.tensors)))
        _compare_sizes(exact, typed if single else self._run(call, True, SIZE))
        watch, A, S = exact.watch, len(call.tensors), len(self.dtypes)
        check = _Check(watch)
        targets = [check.coefficients(t) for t in exact.returned]
        kept_dtypes, kept, origin, seen = [], [], [], {}
        after = {}

        def slot(t, twin):
            """A tensor that the scheduler keeps: one more slot, unless it is there already."""
            c = check.coefficients(t)
            if c.tobytes() not in seen:
                seen[c.tobytes()] = Slot(len(origin))
                one = int(np.argmax(c)) if np.count_nonzero(c) == 1 and c.max() == 1 else -1
                if A <= one < A + S:
                    origin.append(("kept", one))
                elif 0 <= one < A and t.data_ptr() == exact.addresses[one]:
                    origin.append(("argument", one))  # the scheduler holds the very tensor that it was given
                elif one in watch.noise_slots:
                    origin.append(("noise", one))
                else:
                    origin.append(("target", len(targets)))
                    targets.append(c)
                    kept.append(torch.float32)
                kept_dtypes.append(twin.dtype)
            return seen[c.tobytes()]

        for name, value in exact.attributes.items():
            twins = []
            _collect(typed.attributes[name], watch.shape, twins)
            left = iter(twins)
            after[name] = mapped(value, lambda v, left=left: slot(v, next(left)) if _is_probe(v, watch.shape) else v)

        changes = {
            name: value
            for name, value in after.items()
            if name != "noise_sampler"
            and (holds_slots(value) or not (name in self.attributes and same(value, self.attributes[name])))
        }
        last = self.attributes.get("noise_sampler")
        row = Row(
            A,
            S,
            watch.next,
            tuple(typed.watch.draws),
            last if isinstance(last, tuple) else None,
            tuple(watch.noise_slots),
            watch.clip and watch.clip._replace(before=watch.clip.before[:BASIS]),
            np.array(targets).reshape(-1, BASIS),
            tuple(t.dtype for t in typed.returned),
            tuple(kept),
            tuple(origin),
            exact.build,
            check.residual,
        )
        if not origin and not changes and not S:
            return row, self, changes  # the step leaves no trace: any timestep may come next
        return row, Node(self.parent, self.method, after, tuple(kept_dtypes)), changes


def _compare_sizes(one: _Pass, other: _Pass) -> None:
    """A coefficient that depends on the tensors, through a norm or a mean, is another one for larger tensors."""
    for a, b in zip(one.latents(), other.latents(), strict=True):
        a, b = read(a)[:BASIS], read(b)[:BASIS] / SIZE
        if np.isfinite(a).all() and np.abs(a - b).max() > 1e-3 * np.abs(a).max() + 1e-6:
            raise NotLinear("its coefficients depend on how large the tensors are")


class _Check:
    """Reads coefficients, and compares what they give on random numbers with what the step gave."""

    def __init__(self, watch: Watch):
        self.values = VALUES[:, BASIS:].copy()
        self.residual = 0.0
        if watch.clip is not None:
            inner = self._compare(watch.clip.before)
            if watch.clip.quantile is None:  # else it is a number like any other
                self.values[watch.clip.slot] = np.clip(inner @ self.values, watch.clip.lo, watch.clip.hi)

    def coefficients(self, t: torch.Tensor) -> np.ndarray:
        return self._compare(read(t))

    def _compare(self, flat: np.ndarray) -> np.ndarray:
        c, got = flat[:BASIS], flat[BASIS:]
        if not np.isfinite(flat).all() or np.abs(c).max() > 3e38:
            raise NotLinear("it returns infinities or NaN")
        scale = (np.abs(c) @ np.abs(self.values)).max()
        error = np.abs(c @ self.values - got).max() / max(scale, 1e-30)
        if error > TOLERANCE or scale == 0 and got.any():
            raise NotLinear(f"it is not linear in latent, model output and noise (residual {error:.2g})")
        self.residual = max(self.residual, float(error))
        return c


def _is_probe(value, shape) -> bool:
    return isinstance(value, torch.Tensor) and tuple(value.shape) == shape


def _collect(value, shape, found: list) -> None:
    mapped(value, lambda v: found.append(v) if _is_probe(v, shape) else None)


def opened(out, shape):
    """The latents among what a step returned, and a function that returns others in their place."""
    fields = list(out.items()) if isinstance(out, dict) else list(enumerate(out)) if isinstance(out, tuple) else None
    if fields is None:
        raise NotLinear(f"it returns {type(out).__name__}")
    places = [key for key, value in fields if _is_probe(value, shape)]
    if len(places) < sum(isinstance(value, torch.Tensor) for _, value in fields) or not places:
        raise NotLinear("it returns tensors of another shape than the latent's")
    rest = {key: value for key, value in fields if key not in places}
    if isinstance(out, dict):
        kind = type(out)
        return [out[key] for key in places], lambda tensors: kind(**{**rest, **dict(zip(places, tensors))})
    size = len(fields)

    def as_tuple(tensors):
        whole = {**rest, **dict(zip(places, tensors))}
        return tuple(whole[i] for i in range(size))

    return [out[key] for key in places], as_tuple


_roots: OrderedDict = OrderedDict()


def root(parent: type, method: str, attributes: dict) -> Node:
    """The node of a scheduler in a state that holds no latents. Equal states share one, and what was found from it."""
    attributes = {
        name: mapped(value, lambda v: v.detach().cpu().clone() if isinstance(v, torch.Tensor) else v)
        for name, value in attributes.items()
    }
    key = parent, method, frozen(attributes)
    node = _roots.pop(key, None) or Node(parent, method, attributes)
    _roots[key] = node
    while len(_roots) > 64:
        _roots.pop(next(iter(_roots)), None)
    return node
