"""Noise that a caller gives, in place of what the rows would draw: ``fd.sample(..., noise=...)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from .action import Acting, Setting, checked_output
from .checks import FLOATS
from .plan import Plan
from .samplers.stage import Noise

__all__ = ["Given", "noise_given"]

OF_STEERING = ("travel", "guide")
"""Streams of draws that are no part of the sampler: they come from a sample's seed in any case."""


class Given(Acting):
    """An action that gives a run its noise. The last of the actions, so that it sees the rows as they will be.

    noise: called as noise(stream, draw) for every normal that the plan addresses, in the order of the rows, for a tensor of the
    latent's shape; or anything with ``randn_like``, such as a ``TorchCudaGenerator``, which draws one after the other.

    ``fd.sample`` appends it to the steering. In a loop of one's own:

        with Actions([*steering, given], plan, shape, model) as actions:
            run = fd.Stepper(actions.plan, shape, seeds, init=given.start(init), **actions.bank)
            while not run.done:
                run.step(*actions.outputs(run))
    """

    def __init__(self, noise):
        self._draws_like = getattr(noise, "randn_like", None)
        if not callable(self._draws_like) and not callable(noise):
            raise TypeError(f"noise is {type(noise).__name__}: "
                            "a function of (stream, draw), or something with randn_like, is taken")
        self._noise = noise
        self._held: dict[Noise, torch.Tensor] = {}

    def begin(self, setting: Setting) -> Given:
        self.plan, self._first, self._taken = noise_given(setting.plan)
        self._held = {}  # an earlier run may have ended early
        self._slots = max(map(len, self._taken))
        rows = [(address, r) for r, sums in enumerate(self._taken) for terms in sums for address in terms]
        self._last = dict(rows)  # the last row that takes a draw
        self._like = torch.empty((setting.size, *setting.shape[1:]), dtype=torch.float32, device=setting.device)
        return self

    def start(self, init: torch.Tensor | None) -> torch.Tensor | None:
        """What the run starts from: init, with the noise that its first row would add."""
        if not self._first:
            return init
        added = self._sum(self._first)
        return added if init is None else init.to(added.device, torch.float32) + added

    def outputs(self, run, evaluate: Callable[[], tuple]) -> tuple:
        outputs, row = evaluate(), run.row
        given = [self._sum(terms) for terms in self._taken[row]]
        self._held = {address: drawn for address, drawn in self._held.items() if self._last.get(address, -1) > row}
        return (*outputs, *given, *[run.x] * (self._slots - len(given)))  # a row that does not read it may be given anything

    def _sum(self, terms: dict[Noise, float]) -> torch.Tensor:
        """Weighted normals as one tensor; a single one as it is given."""
        if list(terms.values()) == [1.0]:
            return self._drawn(*terms)
        return sum(weight * self._drawn(address).float() for address, weight in terms.items())

    def _drawn(self, address: Noise) -> torch.Tensor:
        if address not in self._held:
            drawn = self._draws_like(self._like) if self._draws_like else self._noise(address.stream, address.draw)
            checked_output(drawn, self._like.shape, "noise")
            if drawn.layout != torch.strided:
                raise TypeError(f"noise returned a tensor of layout {drawn.layout}: torch.strided is taken")
            dtype = torch.float32 if drawn.dtype == torch.float64 else drawn.dtype
            drawn = drawn.to(self._like.device, dtype, copy=not self._draws_like)  # the function may fill its tensor again
            if drawn.dtype not in FLOATS:
                raise TypeError(f"noise returned {drawn.dtype}: torch.float32, torch.float16, torch.bfloat16 or torch.float64 is taken")
            self._held[address] = drawn
        return self._held[address]


def noise_given(plan: Plan) -> tuple[Plan, dict[Noise, float], list[list[dict[Noise, float]]]]:
    """The plan with inputs "noise0", ... in place of the normals that its rows draw.

    Returns the plan; the weighted normals to be added to what the run starts from; for each row the weighted normals, squares
    summing to 1, of its inputs. What outputs read in the same proportions is one input: the base and the next model input mostly
    do. Raises ``ValueError`` where a row without a call of the model draws later on, which could not be handed its noise, and
    where known parts of an image are noised, which is no input of the row.
    """
    first, rows, taken = {}, [], []
    for r, row in enumerate(plan.rows):
        own = [{s: c for s, c in terms.items() if isinstance(s, Noise) and s.stream not in OF_STEERING} for terms in row.y]
        rest = [{s: c for s, c in terms.items() if s not in drawn} for terms, drawn in zip(row.y, own)]
        if row.mask_noise is not None:
            raise ValueError(f"noise was given, but the plan ({plan.name!r}) noises the known part of an image from its seeds: "
                             "make it without inpaint=")
        if not row.calls_model and any(own):
            if r or not own[0]:
                raise ValueError(f"noise was given, but row {r} of the plan ({plan.name!r}) draws without a call of the model")
            first, rest = _of_start(own, rest)
            own = [{}] * len(own)
        sums: list[dict[Noise, float]] = []
        for terms, drawn in zip(rest, own):
            if drawn:
                place, weight = _placed(sums, drawn)
                terms[f"noise{place}"] = weight
        rows.append(replace(row, y=tuple(rest)))
        taken.append(sums)
    inputs = (*plan.inputs, *(f"noise{k}" for k in range(max(map(len, taken)))))
    made = Plan.from_rows(rows, inputs=inputs, outputs=plan.outputs, ring=plan.ring, bank=plan.bank, name=plan.name,
                          info=plan.info)
    return made, first, taken


def _placed(sums: list[dict[Noise, float]], drawn: dict[Noise, float]) -> tuple[int, float]:
    """Where a sum of normals stands among those of unit variance, at the end if it is new, and its weight."""
    weight = math.copysign(math.hypot(*drawn.values()), next(iter(drawn.values())))
    unit = {address: c / weight for address, c in drawn.items()}
    for place, known in enumerate(sums):
        if known.keys() == unit.keys() and all(abs(known[a] - c) < 1e-12 for a, c in unit.items()):
            return place, weight
    sums.append(unit)
    return len(sums) - 1, weight


def _of_start(own: list[dict], rest: list[dict]) -> tuple[dict[Noise, float], list[dict]]:
    """The first row's normals as part of the base that it reads. Its outputs are multiples of one another."""
    scale = rest[0].get("x")
    if scale:
        return {address: c / scale for address, c in own[0].items()}, rest
    ratios = [math.hypot(*drawn.values()) / math.hypot(*own[0].values()) for drawn in own]
    return own[0], [{"x": ratio} if ratio else {} for ratio in ratios]
