"""Recursive Feature Machines: the directions in which a kernel machine that learnt the labels changes most.

Radhakrishnan, Beaglehole, Pandit and Belkin 2024, "Mechanism for feature learning in neural networks and backpropagation-free
machine learning models" (Science 383:1461), algorithm 1; with the Laplace kernel of one metric M::

    d_M(x, z) = sqrt((x - z)^T M (x - z))            K_M(x, z) = exp(-d_M(x, z) / L)
    alpha     = (K_M(X, X) + lambda I)^-1 y          f(z) = sum_i alpha_i K_M(x_i, z)
    grad f(z) = (1/L) sum_i alpha_i K_M(x_i, z) / d_M(x_i, z) M (x_i - z)        without the terms of d_M = 0
    M         <- sum_j grad f(x_j) grad f(x_j)^T, divided by its largest entry   (the AGOP), from M = I

The concept vector is the top eigenvector of the AGOP (Beaglehole et al. 2025, arXiv:2502.03708). Which iteration's AGOP is
taken, and the rest of the settings, follow the xrfm package (kernel "l2_high_dim", ``get_agop_best_model``).
"""

import math
from dataclasses import dataclass

import torch

from .samples import Samples, auc

__all__ = ["RFM", "KernelPredictor", "LaplaceKernel", "fit_rfm", "fit_rfm_features"]

STOP = 1.1
"""Iterations end where the held-out AUC has fallen by this factor below the best, as in xrfm."""
COINCIDENT = 1e-12
"""Samples are the same point where d^2 is below this share of |x|^2 + |z|^2: less is left of a float64 difference."""


class LaplaceKernel:
    """The kernel of one metric on the training samples, from their inner products in that metric, and its solver.

    gram (n, n), cross (m, n), held_norms (m,): X M X^T, X_held M X^T, diag(X_held M X_held^T), float64; bandwidth: L, or with
    ``adaptive`` its multiple of the median distance between two samples; ridge: lambda.
    """

    def __init__(self, gram, cross, held_norms, bandwidth: float, ridge: float, adaptive: bool = False):
        d, same = _distances(gram, gram.diagonal(), gram.diagonal())
        if adaptive:
            bandwidth = bandwidth * _median_off_diagonal(d)
        kernel = (d / -bandwidth).exp_()
        self.slope = torch.where(same, 0.0, kernel / (bandwidth * d))
        self.held = (_distances(cross, held_norms, gram.diagonal())[0] / -bandwidth).exp_()
        kernel.diagonal().add_(ridge)
        self._factor, failed = torch.linalg.cholesky_ex(kernel)
        if failed:
            raise ValueError(f"the kernel with ridge {ridge:g} is not positive definite in float64: a larger ridge is taken")

    def solve(self, y: torch.Tensor) -> torch.Tensor:
        """alpha (n,) for labels y (n,)."""
        return torch.cholesky_solve(y[:, None], self._factor)[:, 0]


def _distances(gram, rows, columns):
    """d (r, c) from inner products and squared norms, and where it is 0."""
    sums = rows[:, None] + columns
    squares = sums - 2 * gram
    same = squares <= COINCIDENT * sums
    return squares.masked_fill_(same, 0.0).sqrt_(), same


def _median_off_diagonal(d) -> float:
    n = len(d)
    median = float(d.flatten()[:-1].view(n - 1, n + 1)[:, 1:].median())
    return median if median > 0 else 1.0


@dataclass(frozen=True)
class RFM:
    """What a fit returns. weights: (n,) float64, the direction is X^T weights; best: the iteration, from 0, whose AGOP it is;
    aucs: of the predictors on the held-out samples; share: of the AGOP's trace that its top eigenvalue is."""

    weights: torch.Tensor
    best: int
    aucs: list[float]
    share: float


def fit_rfm(samples: Samples, positive, held_positive, kernel: LaplaceKernel, *, bandwidth: float, ridge: float = 1e-3,
            iterations: int = 5, center_grads: bool = False, adaptive: bool = False, choose: bool = True) -> RFM:
    """RFM in sample space: exact, and free of any (d, d) matrix.

    The gradients at the samples are G = P X with P (n, n). With S = X X^T, M = G^T G = X^T P^T P X and B = P S::

        X M X^T = B^T B      X_held M X^T = X_held X^T P^T B      grad f(X) = T X M = (T B^T P) X
        T = R - diag(R 1),   R_ji = alpha_i K_ji / (L d_ji)       top eigenvector of G^T G:  X^T P^T u, u of G G^T = B P^T

    P is scaled so that the largest entry of M is 1. An iteration costs four products of n^3, a Cholesky factor, and n^2 d for
    the scale.

    positive (n,), held_positive (m,): bool; kernel: ``LaplaceKernel`` of M = I with this bandwidth, ridge and adaptive: it
    is the same for every label. choose: take the AGOP of the predictor with the highest held-out AUC; else that of the last
    iteration. Raises ``ValueError`` where the predictor is constant.
    """
    y = positive.to(samples.device, torch.float64)
    p = b = None
    aucs, best, kept = [], 0, None
    for t in range(iterations):
        alpha = kernel.solve(y)
        aucs.append(auc(kernel.held @ alpha, held_positive))
        r = kernel.slope * alpha
        r.diagonal().sub_(r.sum(1))
        p = r if p is None else r @ (b.T @ p)
        if center_grads:
            p -= p.mean(0)
        largest = samples.largest_column(p)
        if not 0 < largest < math.inf:
            raise ValueError(f"iteration {t} of RFM found no direction: the largest norm of a column of its gradients is "
                             f"{largest:g}. Bandwidth {bandwidth:g} and ridge {ridge:g} do not suit these activations")
        p /= largest
        if kept is None or not choose or aucs[t] > aucs[best]:
            best, kept = t, p
        if choose and aucs[t] < aucs[best] / STOP or t + 1 == iterations:
            break
        b = p @ samples.gram
        across = p @ samples.cross.T
        kernel = LaplaceKernel(b.T @ b, across.T @ b, across.square().sum(0), bandwidth, ridge, adaptive)
    agop = kept @ samples.gram @ kept.T
    value, u = top_eigenvector(agop)
    return RFM(kept.T @ u, best, aucs, value / float(agop.trace()))


def top_eigenvector(matrix: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The largest eigenvalue and its unit eigenvector (n,) of a symmetric float64 matrix (n, n)."""
    if matrix.is_cuda:
        values, vectors = torch.linalg.eigh(matrix)
        return float(values[-1]), vectors[:, -1]
    from scipy.linalg import eigh

    n = len(matrix)
    values, vectors = eigh(matrix.cpu().numpy(), subset_by_index=(n - 1, n - 1))  # one vector: a fifth of the time of all
    return float(values[0]), torch.from_numpy(vectors[:, 0])


# ---- in feature space: the formulas above as they stand, for a few hundred dimensions, to check the above against


class KernelPredictor:
    """f(z) = sum_i alpha_i K_M(x_i, z). x: (n, d), alpha: (n,), metric: M (d, d), all float64; bandwidth: L."""

    def __init__(self, x: torch.Tensor, alpha: torch.Tensor, metric: torch.Tensor, bandwidth: float):
        self.x, self.alpha, self.metric, self.bandwidth = x, alpha, metric, bandwidth

    def distances(self, z: torch.Tensor) -> torch.Tensor:
        """d_M(z_j, x_i) (m, n)."""
        return torch.stack([((self.x - point) @ self.metric * (self.x - point)).sum(1).clamp_min(0).sqrt() for point in z])

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """f (m,) at points z (m, d)."""
        return (-self.distances(z) / self.bandwidth).exp() @ self.alpha

    def gradients(self, z: torch.Tensor) -> torch.Tensor:
        """The gradients of f (m, d) at points z (m, d)."""
        d = self.distances(z)
        r = torch.where(d < 1e-10, 0.0, self.alpha * (-d / self.bandwidth).exp() / (self.bandwidth * d))
        return torch.stack([r[j] @ (self.x - point) for j, point in enumerate(z)]) @ self.metric


def fit_rfm_features(x, positive, x_held, held_positive, *, bandwidth: float, ridge: float = 1e-3, iterations: int = 5,
                     center_grads: bool = False, adaptive: bool = False, choose: bool = True) -> tuple[torch.Tensor, list[float]]:
    """The direction (d,) float64 that ``fit_rfm`` finds, and the predictors' held-out AUCs, in feature space: n d^2 and n^2 d
    an iteration, and d^2 numbers. x: (n, d), x_held: (m, d); positive, held_positive: bool. Float64, whatever was given.
    """
    x, x_held, y = x.double(), x_held.double(), positive.double()
    metric = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    aucs, best, kept = [], 0, None
    for t in range(iterations):
        predictor = KernelPredictor(x, y, metric, bandwidth)
        d = predictor.distances(x)
        if adaptive:
            predictor.bandwidth = bandwidth * _median_off_diagonal(d)
        kernel = (-d / predictor.bandwidth).exp()
        predictor.alpha = torch.linalg.solve(kernel + ridge * torch.eye(len(x), dtype=torch.float64, device=x.device), y)
        aucs.append(auc(predictor(x_held), held_positive))
        g = predictor.gradients(x)
        if center_grads:
            g = g - g.mean(0)
        metric = g.T @ g
        metric = metric / metric.max()
        if kept is None or not choose or aucs[t] > aucs[best]:
            best, kept = t, metric
        if choose and aucs[t] < aucs[best] / STOP:
            break
    return torch.linalg.eigh(kept)[1][:, -1], aucs
