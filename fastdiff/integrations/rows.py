"""A probed row as calls of the step op."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..differentiable import step as differentiable_step
from ..reference import Layout
from ..reference.step import CLIP, LIMITS
from ..stepper import on_device
from .calls import BASIS, NotLinear
from .probing import Row

__all__ = ["Part", "Ready", "Steer", "apply", "prepare", "ready"]

_step = torch.ops.fastdiff.step_.default


class Steer(NamedTuple):
    """What stands in a row for the model's output m: weight m, more tensors, and vectors of a bank, each with its weight.

    output: the slot of m; extras: weights of tensors in the slots from ``BASIS`` on; bank: weights of the bank's columns.
    """

    output: int
    weight: float
    extras: tuple[float, ...]
    bank: tuple[float, ...]


class Part(NamedTuple):
    """One call of the op: at most three outputs of a row. inputs: places among the row's slots; banked: whether it reads the
    bank; keys: of the noise columns, from the first draw of the row; path: the normals of a run's path (N, J), and which of them
    are the noise columns; threshold: q, low and high of ``quantile_``; coef (1, width)
    float32 and meta (1, 4) int32 as ``step_`` takes them."""

    inputs: tuple[int, ...]
    outputs: int
    banked: bool
    keys: tuple[int, int] | None
    path: tuple[int, np.ndarray] | None
    threshold: tuple[float, float, float] | None
    coef: np.ndarray | torch.Tensor
    meta: np.ndarray | torch.Tensor


class Ready(NamedTuple):
    """A row on a device. dtypes: of the outputs of all parts; origin: as of the row, but that a noise which is kept has to be
    written where it is drawn inside of the step."""

    parts: list[Part]
    dtypes: list[torch.dtype]
    origin: list[tuple[str, int]]


def ready(row: Row, philox: bool, device: torch.device, steer: Steer | None = None) -> Ready:
    """The row on a device. philox: noise comes from keys, and is no input. Raises ``NotLinear`` for too many inputs."""
    found = row.ready.get((philox, device, steer))
    if found is None:
        prepare([(row, steer)], philox, device)
        found = row.ready[philox, device, steer]
    return found


def prepare(rows: list[tuple[Row, Steer | None]], philox: bool, device: torch.device) -> None:
    """Many rows, in one copy to the device."""
    rows = [(row, steer) for row, steer in rows if (philox, device, steer) not in row.ready]
    made = [_on_host(row, philox, steer) for row, steer in rows]
    arrays = [array for own in made for part in own.parts for array in (part.coef, part.meta)]
    with torch.inference_mode(False):
        there = iter(on_device(device, *arrays)) if arrays else iter(())
    for (row, steer), own in zip(rows, made):
        row.ready[philox, device, steer] = own._replace(
            parts=[part._replace(coef=next(there), meta=next(there)) for part in own.parts]
        )


def _on_host(row: Row, philox: bool, steer: Steer | None) -> Ready:
    targets, dtypes, origin = row.targets, [*row.returned, *row.kept], list(row.origin)
    for i, (kind, slot) in enumerate(row.origin):
        if kind == "noise" and philox or kind == "argument" and steer is not None and slot == steer.output:
            origin[i] = "target", len(targets)
            targets = np.concatenate([targets, np.eye(targets.shape[1])[slot : slot + 1]])
            dtypes.append(torch.float32)
    most = LIMITS["outputs"]
    parts = [_part(row, targets[i : i + most], philox, steer) for i in range(0, len(targets), most)]
    return Ready(parts, dtypes, origin)


def _steered(weights: np.ndarray, steer: Steer | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights (..., BASIS) of a row's slots as weights of slots and more tensors, and of the bank's columns."""
    if steer is None:
        return weights, weights[..., :0]
    of_output = weights[..., steer.output, None].copy()
    weights = np.concatenate([weights, of_output * steer.extras], -1)
    weights[..., steer.output] *= steer.weight
    return weights, of_output * steer.bank


def _part(row: Row, targets: np.ndarray, philox: bool, steer: Steer | None) -> Part:
    clip = row.clip
    d, before = (None, np.zeros(targets.shape[1])) if clip is None else (clip.slot, clip.before)
    clips = d is not None and targets[:, d].any()
    if clips and any(before[k] != 0 for k in row.noise_slots) and philox:
        raise NotLinear("it clips what it has added noise to")
    weights, first, path = np.zeros((len(targets), 0)), 0, None
    if philox and row.along is not None:
        weights, path = targets[:, list(row.noise_slots)] @ row.along.weights, (row.along.row, row.along.draws)
    elif philox:
        weights, first = _noise_weights(row, targets)
    (targets, of_bank), (before, before_bank) = _steered(targets, steer), _steered(before, steer)
    banked = bool(of_bank.any() or clips and before_bank.any())
    of_bank, before_bank = (of_bank, before_bank) if banked else (of_bank[:, :0], before_bank[:0])
    known = list(range(row.arguments + row.states)) + ([] if philox else list(row.noise_slots))
    known += range(BASIS, targets.shape[1])
    used = [k for k in known if targets[:, k].any() or clips and before[k] != 0]
    if len(used) > LIMITS["inputs"]:
        raise NotLinear(f"it combines {len(used)} tensors: at most {LIMITS['inputs']} are taken")
    layout = Layout(len(used), len(targets), len(before_bank), weights.shape[1])
    coef, meta = np.zeros((1, layout.width)), np.array([[-1, 0, -1, -1]], np.int32)
    p, g, bounds, ys, _ = layout.unpack(coef[0])
    if clips:
        p[:], g[:] = before[used], before_bank
        bounds[:] = clip.lo, clip.hi, 1.0
        meta[0, 1] = CLIP
    for target, of, w, (a, a_d, h, terms) in zip(targets, of_bank, weights, ys):
        a[:], h[:] = target[used], of
        a_d[:] = target[d] if clips else 0.0
        terms[:] = w
    keys = (first, first + weights.shape[1]) if weights.shape[1] and path is None else None
    threshold = (clip.quantile, clip.lo, clip.hi) if clips and row.thresholds else None
    return Part(tuple(used), len(targets), banked, keys, path, threshold, coef.astype(np.float32), meta)


def _noise_weights(row: Row, targets: np.ndarray) -> tuple[np.ndarray, int]:
    """(outputs, columns) weights of consecutive draws, and the number of the first, 0 being the row's own first.

    Increments of one Brownian path between (a, b) and then (a, c), b on the way, share the part from a to b: the second is
    sqrt(|a-b| / |a-c|) of the first and sqrt(|b-c| / |a-c|) of a draw of its own.
    """
    terms, asked = [], row.asked
    for j, draw in enumerate(row.draws):
        own = {j: 1.0}
        if draw.how == "brownian":
            a, c = map(float, draw.between)
            if asked is not None and asked[0] == a and min(a, c) < asked[1] < max(a, c):
                shared = (a - asked[1]) / (a - c)
                own = {j - 1: shared**0.5, j: (1 - shared) ** 0.5}
            asked = a, c
        terms.append(own)
    weights = np.zeros((len(targets), len(row.draws) + 1))
    for own, slot in zip(terms, row.noise_slots):
        for draw, weight in own.items():
            weights[:, draw + 1] += weight * targets[:, slot]
    drawn = np.flatnonzero(weights.any(0))
    if not len(drawn):
        return weights[:, :0], 0
    if drawn[-1] - drawn[0] >= LIMITS["noises"]:
        raise NotLinear(f"it draws {len(drawn)} noises: at most {LIMITS['noises']} are taken")
    return weights[:, drawn[0] : drawn[-1] + 1], int(drawn[0]) - 1


def apply(row: Ready, values: list[torch.Tensor], like: torch.Tensor, draws, bank=(None, None, None)) -> list[torch.Tensor]:
    """Runs a row. values: tensors by slot; like: a tensor of the shape and layout of the outputs; draws: ``Draws`` of the
    run, or None; bank: bank, bank_index and bank_weight as ``step_`` takes them."""
    outputs, bounds = [], None
    for part in row.parts:
        inputs = [values[k] for k in part.inputs]
        if part.threshold is not None and bounds is None:
            bounds = torch.empty(len(like), 3, dtype=torch.float32, device=like.device)
            torch.ops.fastdiff.quantile_(None, bounds, inputs, part.coef, None, 0, None, *part.threshold)
        dtypes = row.dtypes[len(outputs) : len(outputs) + part.outputs]
        drawn = None
        if part.keys is not None:
            drawn = draws.keys(*part.keys, like.device)
        elif part.path is not None:
            drawn = draws.along(*part.path, like.device)
        vectors = bank if part.banked else (None, None, None)
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            outputs += differentiable_step(inputs, dtypes, None, part.coef, part.meta, None, 0, drawn, None, *vectors)
            continue
        made = [torch.empty_like(like, dtype=dtype) for dtype in dtypes]
        _step(inputs, made, None, part.coef, part.meta, None, 0, drawn, None, *vectors, bounds, None, None, None)
        outputs += made
    return outputs
