"""How samples are judged: confidence, classes, Frechet distance, trace ratio, nearest training image. In float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.zoo.data import CLASSES


@torch.inference_mode()
def judge_all(judge: nn.Module, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Class probabilities (N, 10) and features (N, 64), both float64, of images (N, 1, 28, 28) in [-1, 1]."""
    logits, features = [], []
    for part in images.split(batch):
        features.append(judge.features(part).double())
        logits.append(judge(part).double())
    return torch.cat(logits).softmax(dim=1), torch.cat(features)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and unbiased covariance (C, C) of features (N, C)."""
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T)


def square_root(matrix: Tensor) -> Tensor:
    """Square root of a positive semi-definite matrix; eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians given as (mean, covariance), Dowson and Landau 1982::

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2))

    The form with S_a^(1/2) on both sides has the same trace as sqrt(S_a S_b) and stays symmetric, so eigh is enough.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root = square_root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def describe(probabilities: Tensor, features: Tensor, reference: tuple[Tensor, Tensor]) -> dict[str, object]:
    """Judge's confidence, class histogram, Frechet distance to `reference` (mean, covariance) and trace ratio to it."""
    confidence, label = probabilities.max(dim=1)
    own = moments(features)
    return {
        "count": len(features),
        "confidence_mean": round(float(confidence.mean()), 4),
        "confidence_median": round(float(confidence.median()), 4),
        "frechet": round(frechet(own, reference), 4),
        "trace_ratio": round(float(own[1].trace() / reference[1].trace()), 4),
        "classes": dict(zip(CLASSES, torch.bincount(label, minlength=len(CLASSES)).tolist(), strict=True)),
    }


def nearest(images: Tensor, others: Tensor, *, batch: int = 6000, quiet: bool | None = None) -> tuple[Tensor, Tensor]:
    """Euclidean distance (N,), float64, of each image to the nearest of `others` (M, ...), and its index."""
    flat = images.flatten(1)
    best = torch.full((len(flat),), torch.inf)
    index = torch.zeros(len(flat), dtype=torch.int64)
    square = flat.square().sum(dim=1)[:, None]
    for start in tqdm(range(0, len(others), batch), desc="nearest", disable=quiet):
        part = others[start : start + batch].flatten(1)
        found, at = (square + part.square().sum(dim=1) - 2 * flat @ part.T).min(dim=1)
        index = torch.where(found < best, at + start, index)
        best = torch.minimum(best, found)
    # |a|^2 + |b|^2 - 2 a.b cancels for near-copies, the very case looked for: take the winners' distance directly.
    exact = (flat.double() - others[index].flatten(1).double()).square().sum(dim=1).sqrt()
    return exact, index
