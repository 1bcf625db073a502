"""Inner products of what a row reads, by sample."""

import math
from collections.abc import Mapping, Sequence

import torch

from ..action import Setting
from ..checks import FLOATS, dense
from ..plan import Plan, Row

__all__ = ["Pair", "readable"]


def readable(value: torch.Tensor) -> torch.Tensor:
    """A tensor that a row will read, as the ops take it. Raises ``TypeError`` as ``Stepper.step`` does, which comes after."""
    if value.dtype not in FLOATS:
        raise TypeError(f"the model returned {value.dtype}: torch.float32, torch.float16 or torch.bfloat16 is taken")
    return dense(value)


class Pair:
    """Two combinations of a row's tensors, in float32, and inner products of them.

    slots: names of the tensors; rows: for each row of the plan the weights of the slots in the first and in the second, None
    where neither is needed; "first" as a slot is the first combination of the last call. products: for the first, or for both,
    what each is multiplied with: 0, 1, or MEAN, whose product with n elements is sqrt(n) times their mean.
    """

    MEAN = 2

    def __init__(self, setting: Setting, slots: Sequence[str], rows: Sequence[tuple[Mapping, Mapping] | None],
                 products: Sequence[Sequence[int]]):
        size, shape, device = setting.size, setting.shape[1:], setting.device
        made = Plan.from_rows([Row(d={}, y=row or ({}, {})) for row in rows], inputs=slots, outputs=("first", "second"))
        self._slots = slots
        self._coef, self._meta = (torch.from_numpy(t).to(device) for t in made.table())
        self._all = torch.empty(2 * size + 1, *shape, device=device)  # the first of all samples, the second, what gives means
        self._all[-1] = max(math.prod(shape), 1) ** -0.5
        self.first = self._all[:size]
        self._outputs = [self.first, self._all[size:-1]]
        terms = max(map(len, products))
        index = torch.zeros(len(products), size, terms, dtype=torch.int64, device="cpu")
        weight = torch.zeros(len(products), size, terms, device="cpu")
        for i, others in enumerate(products):
            for m, j in enumerate(others):
                index[i, :, m] = 2 * size if j == self.MEAN else j * size + torch.arange(size, device="cpu")
                weight[i, :, m] = 1
        self._index = index.flatten(0, 1).to(device)
        self._weight = None if bool(weight.all()) else weight.flatten(0, 1).to(device)
        self._gain = torch.ones(1, 2 * size + 1, device=device)
        self._offset = torch.zeros_like(self._gain)
        self._products = torch.empty(len(products), size, terms, device=device)

    def __call__(self, row: int, given: Mapping[str, torch.Tensor], scale: torch.Tensor | None = None) -> torch.Tensor:
        """(combinations, size, products) float32. scale: (size, slots) float32, factors of the weights."""
        inputs = [readable(self.first if name == "first" else given[name]) for name in self._slots]
        torch.ops.fastdiff.step_(inputs, self._outputs, None, self._coef, self._meta, None, row, None, scale, *(None,) * 7)
        torch.ops.fastdiff.project_(self._products.flatten(0, 1), self._all[: len(self._index)], self._all, self._index,
                                    self._gain, self._offset, self._weight, None, 0)
        return self._products
