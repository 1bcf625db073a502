"""Samples whose label is known to hang on one direction."""

import torch


def planted(count, shape, seed=0, noise=0.3, spread=1.0):
    """Normals (count, *shape) float64 with variances that differ by element, their labels, and the direction that labels them:
    x . u above its median, some of it hidden by noise."""
    g = torch.Generator().manual_seed(seed)
    d = torch.tensor(shape).prod().item()
    sizes = torch.exp(spread * torch.linspace(-1, 1, d, dtype=torch.float64))
    x = torch.randn(count, d, generator=g, dtype=torch.float64) * sizes
    u = torch.randn(d, generator=g, dtype=torch.float64)
    u /= u.norm()
    score = x @ u
    score = score + noise * score.std() * torch.randn(count, generator=g, dtype=torch.float64)
    return x.view(count, *shape), score > score.median(), u.view(shape)


def cosine(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))
