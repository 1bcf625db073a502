"""A scheduler's attributes as values: copied, compared, used as keys, with ``Slot`` where a tensor of a run stands."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Slot", "filled", "frozen", "holds_slots", "mapped", "same"]


@dataclass(frozen=True)
class Slot:
    """Stands, among a scheduler's attributes, for a tensor of the latent's shape that a run keeps."""

    index: int


def mapped(value, leaf):
    """A copy of lists, deques, tuples and dicts with ``leaf(v)`` in place of everything else."""
    if type(value) is list:
        return [mapped(v, leaf) for v in value]
    if type(value) is deque:
        return deque((mapped(v, leaf) for v in value), value.maxlen)
    if type(value) is tuple:
        return tuple(mapped(v, leaf) for v in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((k, mapped(v, leaf)) for k, v in value.items())
    return leaf(value)


def filled(attributes: dict, tensors) -> dict:
    """Attributes with tensors in place of the slots."""
    return {name: mapped(value, lambda v: tensors[v.index] if isinstance(v, Slot) else v) for name, value in attributes.items()}


def holds_slots(value) -> bool:
    found = []
    mapped(value, lambda v: found.append(v) if isinstance(v, Slot) else None)
    return bool(found)


def same(a, b) -> bool:
    """Whether two attributes are equal. Only tensors on the CPU are compared by value."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.device.type == b.device.type == "cpu" and a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(a, b))
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return bool(a == b)


def frozen(value):
    """A hashable stand-in: equal where the values are equal. What is not known stands for itself."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (
            "tensor",
            str(value.dtype),
            tuple(value.shape),
            value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (list, tuple, deque)):
        return type(value).__name__, tuple(map(frozen, value))
    if isinstance(value, dict):
        return "dict", tuple((k, frozen(v)) for k, v in value.items())
    try:
        hash(value)
    except TypeError:
        return "object", id(value), _Kept(value)
    return type(value), value


class _Kept:
    """Keeps an object alive for as long as its id is part of a key."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Kept) and self.value is other.value

    def __hash__(self):
        return id(self.value)
