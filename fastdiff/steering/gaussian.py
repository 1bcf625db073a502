"""The Gaussian of a data set: mean, and the largest eigenvalues of the covariance with their vectors, in float64.

Its denoiser is known in closed form, the Wiener filter (Wang and Vastola, arXiv:2412.09726):

    D(x, sigma) = mu + sum_k lambda_k / (lambda_k + sigma^2) u_k u_k^T (x - mu)            x = x0 + sigma n
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .data import Seen, batches

__all__ = ["GAIN", "Gaussian"]

GAIN = 0.01
"""Directions whose gain lambda / (lambda + sigma^2) is not above this are left out. Measured on Fashion-MNIST (classes Trouser,
Shirt and Bag): in windows down to sigma 5.3, 3.3, 1.5 and 0.5 the difference of two denoisers moves by at most 5.6, 4.8, 2.6 and
0.8 % of itself, which is 2.2, 1.8, 1.0 and 0.3 % of the data's standard deviation, about alike at every level of the window
(`python -m benchmarks.alignment --error`). ``Gaussian.error`` gives it for each of the two."""
MOMENT_DIMENSIONS = 8192
"""Up to here the (n, n) second moment is kept (512 MiB at the most); beyond, a sketch of SKETCH directions."""
SKETCH = 512
_SMALLEST = 1e-12  # eigenvalues below this share of the largest are rounding


@dataclass(frozen=True, eq=False, repr=False)
class Gaussian:
    """N(mean, covariance) of data, as far as its eigenvectors were kept.

    mean: (*shape) float64; basis: (R, *shape) float32, orthonormal; eigenvalues: (R,) float64, falling, all above 0;
    rest: the variance outside of the basis, summed over all directions; about: what it was fitted on, with at least "count",
    "shape" [*shape], "range" [low, high] of the values, and "asked", the rank that was asked for or None. "enough", if there:
    [sigma, gain], from which levels and gains up no direction is missing.
    Raises ``ValueError`` for what is not that.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    eigenvalues: torch.Tensor
    rest: float
    about: Mapping

    def __post_init__(self):
        R, shape = len(self.eigenvalues), tuple(self.mean.shape)
        if tuple(self.basis.shape) != (R, *shape):
            raise ValueError(f"a basis of shape {tuple(self.basis.shape)} for {R} eigenvalues and a mean of shape {shape}: "
                             f"{(R, *shape)} is taken")
        for name, value in (("mean", self.mean), ("basis", self.basis), ("eigenvalues", self.eigenvalues)):
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} holds values that are not finite")
        if bool((self.eigenvalues <= 0).any()) or bool((self.eigenvalues.diff() > 0).any()):
            raise ValueError("eigenvalues are not positive and falling")
        if not 0 <= self.rest < math.inf:
            raise ValueError(f"rest is {self.rest}: a finite variance of 0 or more is taken")
        missing = [name for name in ("count", "shape", "range", "asked") if name not in self.about]
        if missing:
            raise ValueError(f"about lacks {', '.join(missing)}: count, shape, range and asked are taken")

    @classmethod
    def fit(cls, data, *, sigma: float = 0.0, gain: float = GAIN, rank: int | None = None, name: str = "data") -> Gaussian:
        """Mean and covariance eigenbasis of data, in float64, in one pass.

        data: (N, *shape) of floating point, or an iterable of batches, or of tuples that begin with one (a DataLoader).
        Kept are the eigenvectors whose gain lambda / (lambda + sigma^2) is above ``gain`` at ``sigma``, the lowest noise
        level that they are for (0: all that have variance), or the first ``rank``. name: for messages.

        Up to 8192 dimensions the second moment is summed exactly. Beyond that the eigenvectors come from an incremental
        singular value decomposition (Ross, Lim, Lin and Yang 2008, "Incremental learning for robust visual tracking") of 512 or
        twice ``rank`` directions. It is exact up to as many samples; after that ``about["lost"]`` bounds how far the covariance that it
        found lies below the exact one (in the spectral norm; so does every eigenvalue).

        Raises ``ValueError`` or ``TypeError`` for NaN, fewer than two samples, shapes that differ, integers.

        >>> import fastdiff as fd
        >>> g = Gaussian.fit(fd.randn((500, 1, 2, 2), seeds=0) * 3 + 1)
        >>> tuple(g.basis.shape), bool((g.eigenvalues.sqrt() - 3).abs().max() < 0.3)
        ((4, 1, 2, 2), True)
        """
        if not 0 <= float(sigma) < math.inf:
            raise ValueError(f"sigma is {sigma!r}: a finite noise level of 0 or more is taken")
        if not 0 <= float(gain) < 1:
            raise ValueError(f"gain is {gain!r}: a number from 0 to below 1 is taken")
        if rank is not None and (isinstance(rank, bool) or not hasattr(rank, "__index__") or rank < 0):
            raise ValueError(f"rank is {rank!r}: an int of 0 or more is taken")
        seen, sums = Seen(name), None
        for batch in batches(data, seen):
            flat = batch.reshape(len(batch), -1).to(torch.float64)
            if sums is None:
                n = flat.shape[1]
                sketch = n > MOMENT_DIMENSIONS
                sums = _Variance() if rank == 0 else _Sketch(max(SKETCH, 2 * (rank or 0))) if sketch else _Moments()
            sums.add(flat)
        mean, total, values, vectors = sums.result()
        keep = values > _SMALLEST * float(values[0]) if len(values) and values[0] > 0 else values > 0
        real = int(keep.sum())
        keep &= values > gain / (1 - gain) * float(sigma) ** 2
        R = int(keep.sum()) if rank is None else min(int(rank), real)
        values = values[:R].cpu().contiguous()
        enough = [float(sigma), float(gain)] if rank is None and R < real else None  # None: more directions may have mattered
        about = {**seen.about, "lost": sums.lost, "asked": rank, "enough": enough}
        basis = vectors[:R].to("cpu", torch.float32).reshape(R, *seen.shape).contiguous()
        return cls(mean.reshape(seen.shape).cpu(), basis, values, max(total - float(values.sum()), 0.0), about)

    @property
    def rank(self) -> int:
        return len(self.eigenvalues)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)

    @property
    def variance(self) -> float:
        """The trace of the covariance."""
        return float(self.eigenvalues.sum()) + self.rest

    def gains(self, sigma: float) -> torch.Tensor:
        """(R,) float64: lambda / (lambda + sigma^2)."""
        return self.eigenvalues / (self.eigenvalues + float(sigma) ** 2)

    def tails(self, sigma: float) -> torch.Tensor:
        """(R + 1,) float64: the mean square by which D(x, sigma) moves where only the first r directions are kept, for
        x = x0 + sigma n of this Gaussian: the sum over the others of gain^2 (lambda + sigma^2) = gain lambda. Of what lies
        outside of the basis, a bound: no gain there is above the last one in it."""
        gains = self.gains(sigma)
        outside = self.rest * (float(gains[-1]) if self.rank else 1.0)
        parts = torch.cat([gains * self.eigenvalues, gains.new_tensor([outside])])
        return parts.flip(0).cumsum(0).flip(0)

    def error(self, rank: int, sigma: float) -> float:
        """The root mean square of what the denoiser loses with ``rank`` directions at ``sigma``, as a share of the data's
        standard deviation, sqrt(variance). See ``tails``."""
        return math.sqrt(float(self.tails(sigma)[min(int(rank), self.rank)]) / self.variance) if self.variance else 0.0

    def denoise(self, x: torch.Tensor, sigma) -> torch.Tensor:
        """D(x, sigma), (B, *shape) float64. x: (B, *shape), x0 + sigma n; sigma: a number or (B,)."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has samples of shape {tuple(x.shape[1:])}, the Gaussian is of {self.shape}")
        basis = self.basis.to(x.device, torch.float64).flatten(1)
        mean, values = self.mean.to(x.device).reshape(-1), self.eigenvalues.to(x.device)
        square = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1) ** 2
        along = (x.reshape(len(x), -1).to(torch.float64) - mean) @ basis.T
        return (mean + (along * values / (values + square)) @ basis).reshape(x.shape)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean, "basis": self.basis, "eigenvalues": self.eigenvalues,
                "rest": torch.tensor(self.rest, dtype=torch.float64, device="cpu")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], about: Mapping) -> Gaussian:
        """What ``tensors`` gave. Raises ``ValueError`` where something is missing or is not what it was."""
        dtypes = {"mean": torch.float64, "basis": torch.float32, "eigenvalues": torch.float64, "rest": torch.float64}
        wrong = [name for name, dtype in dtypes.items() if name not in tensors or tensors[name].dtype != dtype]
        if wrong or tensors["rest"].ndim:
            raise ValueError(f"{', '.join(wrong) or 'rest'}: missing or of another dtype or shape than a Gaussian's")
        made = cls(tensors["mean"], tensors["basis"], tensors["eigenvalues"], float(tensors["rest"]), about)
        if list(made.shape) != about.get("shape"):
            raise ValueError(f"a mean of shape {made.shape}, fitted on samples of shape {about.get('shape')}")
        return made

    def __repr__(self) -> str:
        outside = self.rest / (self.variance or 1.0)
        return (f"Gaussian({self.about['count']} samples of shape {self.shape}, {self.rank} eigenvectors, {outside:.2%} of the "
                "variance outside)")


class _Variance:
    """Mean and trace of the covariance, of values shifted by the first batch's mean: no cancellation."""

    lost = 0.0

    def __init__(self):
        self.count, self.shift = 0, None

    def add(self, x):
        if self.shift is None:
            self.shift = x.mean(0)
            self.first, self.squares = torch.zeros_like(self.shift), 0.0
        x = x - self.shift
        self.count += len(x)
        self.first += x.sum(0)
        self.squares += float(x.square().sum())
        return x

    def _mean(self):
        total = self.squares - float(self.first.square().sum()) / self.count
        return self.shift + self.first / self.count, max(total, 0.0) / (self.count - 1)

    def result(self):
        """mean (n,), trace, eigenvalues (k,) falling, vectors (k, n)."""
        mean, total = self._mean()
        return mean, total, mean.new_empty(0), mean.new_empty(0, len(mean))


class _Moments(_Variance):
    """The whole second moment."""

    def add(self, x):
        x = super().add(x)
        if self.count == len(x):
            self.second = x.new_zeros(x.shape[1], x.shape[1])
        self.second.addmm_(x.T, x)

    def result(self):
        mean, total = self._mean()
        covariance = (self.second - torch.outer(self.first, self.first) / self.count) / (self.count - 1)
        values, vectors = torch.linalg.eigh(covariance)
        return mean, total, values.flip(0), vectors.T.flip(0)


class _Sketch(_Variance):
    """Rows whose second moment about the running mean is that of the data, but for what was dropped when they became too
    many: each time the smallest directions, whose largest second moment is added to ``lost``. Dropping a direction takes
    from the covariance and adds nothing, so the sum bounds the spectral norm of all that is missing."""

    def __init__(self, keep):
        super().__init__()
        self.keep, self.dropped, self.rows, self.at = keep, 0.0, None, None

    def add(self, x):
        for part in x.split(self.keep):
            before, part = self.count, super().add(part)
            here = part.mean(0)
            if self.rows is None:
                self.rows, self.at = part - here, here
                continue
            both = before + len(part)  # Ross et al. 2008: the two means differ by one more row
            between = math.sqrt(before * len(part) / both) * (self.at - here)
            self.rows = torch.cat([self.rows, part - here, between[None]])
            self.at = (before * self.at + len(part) * here) / both
            if len(self.rows) > 2 * self.keep:
                self._shrink()

    def _shrink(self):
        squares, vectors = torch.linalg.eigh(self.rows @ self.rows.T)
        self.dropped += max(float(squares[-self.keep - 1]), 0.0)
        self.rows = vectors[:, -self.keep :].T @ self.rows

    @property
    def lost(self):
        return self.dropped / (self.count - 1)

    def result(self):
        mean, total = self._mean()
        if len(self.rows) > self.keep:
            self._shrink()
        squares, vectors = torch.linalg.eigh(self.rows @ self.rows.T)
        squares, vectors = squares.flip(0), vectors.flip(1)
        used = squares > _SMALLEST * squares[0]
        rows = vectors[:, used].T @ self.rows / squares[used].sqrt()[:, None]
        rows = torch.linalg.qr(rows.T)[0].T  # small directions lose orthogonality in the product
        return mean, total, squares[used] / (self.count - 1), rows
