"""Activations in sample space: every direction here is a weighted sum of samples, X^T w, so their inner products suffice.

X (n, d) are the training activations, centred. For d in the tens of thousands nothing of size (d, d) is ever made:
directions are found from X X^T (n, n) and judged on held-out samples through X_held X^T (m, n).
"""

import torch

from ..noise import randn

__all__ = ["Samples", "auc", "split"]

COLUMNS = 4096
"""How many of the d columns are converted to float64 at once."""


class Samples:
    """n training and m held-out activations through their inner products.

    activations: (N, ...) float; train, held: (n,), (m,) int64, which of them. All are centred on the training mean, which
    changes neither distances nor directions.

    gram (n, n), cross (m, n), held_norms (m,): X X^T, X_held X^T and |x_held|^2, summed in float64: 2 n (n + m) d operations,
    once. (Sums in float32 moved the directions of RFM by 1 - |cos| of at most 3e-9 for 1,200 samples of 6,272 dimensions, so
    nothing is gained where float64 is slow but time; but they lose the distance between near copies.)
    """

    def __init__(self, activations: torch.Tensor, train: torch.Tensor, held: torch.Tensor):
        self.shape = tuple(activations.shape[1:])
        flat = activations.detach().flatten(1)
        flat = flat.float() if flat.element_size() < 4 else flat
        mean = flat[train].mean(0, dtype=torch.float64).to(flat.dtype)
        self._x, held = flat[train] - mean, flat[held] - mean
        n, m = len(self._x), len(held)
        kind = {"dtype": torch.float64, "device": flat.device}
        self.gram, self.cross, self.held_norms = torch.zeros(n, n, **kind), torch.zeros(m, n, **kind), torch.zeros(m, **kind)
        for x, other in zip(self._x.split(COLUMNS, 1), held.split(COLUMNS, 1)):
            x, other = x.double(), other.double()
            self.gram += x @ x.T
            self.cross += other @ x.T
            self.held_norms += other.square().sum(1)

    def __len__(self) -> int:
        return len(self._x)

    @property
    def device(self) -> torch.device:
        return self._x.device

    def direction(self, weights: torch.Tensor) -> torch.Tensor:
        """X^T w as a unit vector of the activation's shape, float32. weights: (n,) float64."""
        v = torch.cat([weights @ x.double() for x in self._x.split(COLUMNS, 1)])
        return (v / v.norm()).float().view(self.shape)

    def largest_column(self, p: torch.Tensor) -> float:
        """The largest norm of a column of P X: its square is the largest entry of (P X)^T P X. p: (r, n) float64.

        The one product that costs r n d in each iteration of RFM; it sets a scale, and is summed in the activations' dtype.
        """
        size = float(p.abs().max()) or 1.0  # entries may be as small as a kernel's values far away, e^-300
        p = (p / size).to(self._x.dtype)
        return size * max(float((p @ x).square().sum(0).max()) for x in self._x.split(COLUMNS, 1)) ** 0.5


def auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the ROC curve: the share of pairs (positive, negative) in which the positive has the higher score, ties
    counted half (Mann and Whitney 1947). scores: (m,) float; positive: (m,) bool, with both kinds."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(scores.detach().cpu().double().numpy()))
    positive = positive.cpu()
    p, q = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * q))


def split(groups: torch.Tensor, held_out: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out samples, sorted (n,), (m,) int64, the same for the same seed on any machine.

    groups: (N,) int64; of each group of two or more, the share ``held_out`` is held out, at least one and not all.
    """
    order = randn((len(groups),), seeds=seed, stream="user").argsort()
    held = []
    for group in groups.unique():
        members = order[groups.cpu()[order] == group]
        held.append(members[: min(max(1, round(held_out * len(members))), len(members) - 1)])
    held = torch.cat(held)
    train = torch.ones(len(groups), dtype=torch.bool, device="cpu")
    train[held] = False
    return train.nonzero().flatten(), held.sort().values
