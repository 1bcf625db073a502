"""Noise alignment with one matrix for each noise level, in one launch.

    D_class(x, sigma) - D_full(x, sigma) = A x + b        x = x0 + sigma n, of n values
    A = U_class g_class U_class^T - U_full g_full U_full^T,    b = (1 - A_class) mu_class - (1 - A_full) mu_full

Projections on M directions and their sum read 2 M n numbers a sample, A and b n (n + 1): less where the directions are more than
half as many as the values, which is so for small images and low noise levels. Making A takes n^2 M multiplications a level, in
float64, once: what has been made stays with the alignment.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..action import Acting, Setting
from .gaussian import Gaussian
from .window import fresh_name

__all__ = ["KEPT", "Kept", "Mapped", "affine"]

KEPT = 2**30
"""Bytes of maps that an alignment keeps, at most; the ones that were used last. A run that needs more takes them only if asked to."""


def _one(value) -> int:
    return 1


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Kept:
    """What was made before, by its key: up to ``most`` of it, by ``size``. The oldest goes first."""

    def __init__(self, most: int, size: Callable = _one):
        self._most, self._size, self._values = most, size, OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):  # copies and pickles make their own again
        return Kept, (self._most, self._size)

    def get(self, key, make: Callable):
        """The value of a key; ``make()`` where there is none."""
        with self._lock:
            if key not in self._values:
                with torch.inference_mode(False):  # what uses it next may not be in one
                    self._values[key] = make()
            self._values.move_to_end(key)
            while len(self._values) > 1 and sum(map(self._size, self._values.values())) > self._most:
                self._values.popitem(last=False)
            return self._values[key]


def maps_kept() -> Kept:
    return Kept(KEPT, _bytes)


def affine(full: Gaussian, targets: Sequence[Gaussian], level: float, ranks: Sequence[int], device) -> torch.Tensor:
    """(T (n + 1), *shape) float32 on ``device``: of each target the n rows of A, then b. ranks: directions of the full data, then of
    each target. In float64, rounded once."""

    def filtered(gaussian, rank):
        u = gaussian.basis[:rank].flatten(1).to(device, torch.float64)
        a = (u.T * gaussian.gains(level)[:rank].to(device)) @ u
        mean = gaussian.mean.flatten().to(device)
        return a, mean - a @ mean

    of_full = filtered(full, ranks[0])
    parts = []
    for target, rank in zip(targets, ranks[1:]):
        a, b = (own - all_of_it for own, all_of_it in zip(filtered(target, rank), of_full))
        parts.append(torch.cat([a, b[None]]).to(torch.float32))
    return torch.cat(parts).reshape(-1, *full.shape)


class Mapped(Acting):
    """An alignment at work, as w (A x + b), one more input of the row. maps: of each row that is steered, None of the others;
    weight: (B,); which: (B,), the target of each sample among those that the maps are for."""

    def __init__(self, setting: Setting, rows: np.ndarray, maps: Sequence, weight: torch.Tensor, which: torch.Tensor, targets: int):
        device, size, shape = setting.device, setting.size, setting.shape[1:]
        self.plan = setting.plan.with_input(fresh_name("steer", setting.plan), d=rows.astype(np.float64))
        self._maps, self._weight, self._which = maps, weight, which
        self._scales = np.divide(1, setting.plan.input_scales, out=np.zeros(len(rows)), where=rows).tolist()
        n = int(np.prod(shape))
        self._own = torch.zeros(size, 1, dtype=torch.float32, device=device)
        self._terms = torch.zeros(size, n + 1, dtype=torch.float32, device=device)
        self._columns = torch.arange(n + 1, device=device) if targets > 1 else None
        self._index = None
        self._sum = torch.empty(size, *shape, dtype=torch.float32, device=device)

    def select(self, index: torch.Tensor) -> None:
        self._own.copy_(self._weight[index, None])
        self._terms[:, -1:] = self._own
        still = self._weight[index] == 0
        self._still = still.nonzero()[:, 0].to(self._own.device) if still.any() else None
        if self._columns is not None:  # where all samples have one target, term m is row m
            first = self._which[index] * len(self._columns)
            self._index = first.to(self._columns.device)[:, None] + self._columns

    def outputs(self, run, evaluate) -> tuple:
        outputs = evaluate()
        row = run.row
        if self._maps[row] is not None:
            torch.mul(run.model_input.flatten(1), self._own * self._scales[row], out=self._terms[:, :-1])
            if self._still is not None:  # 0 times infinity is NaN
                self._terms.index_fill_(0, self._still, 0.0)
            torch.ops.fastdiff.lift_(self._sum, self._maps[row], self._index, self._terms)
        return (*outputs, self._sum)
