"""Latent steering vectors: a fixed direction, added to the denoised estimate in a window of noise levels.

    D(x, sigma) += w v

The plainest use of the row's bank: no launch, no pass, nothing that depends on x. With v the difference of two means it is
noise alignment without directions, its limit at high noise. Means of noised data are the means of the data, so nothing is noised.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..action import Acting, Setting
from . import files
from .data import same_scale
from .gaussian import Gaussian
from .window import check_clip, chosen, name_of, per_sample, rows_in

__all__ = ["LatentVector", "Latents"]


@dataclass(frozen=True, eq=False, repr=False)
class LatentVector:
    """One or more directions of the data's shape, by name.

    vectors: (K, *shape) float32; names: K of them; about: what they were fitted on. Raises ``ValueError`` or ``TypeError``.
    """

    vectors: torch.Tensor
    names: tuple[str, ...] = ("vector",)
    about: Mapping | None = None

    def __post_init__(self):
        v = self.vectors
        if not isinstance(v, torch.Tensor) or not v.is_floating_point():
            given = v.dtype if isinstance(v, torch.Tensor) else type(v).__name__
            raise TypeError(f"vectors is {given}: a tensor (K, ...) of floating point is taken")
        names = tuple(map(name_of, self.names))
        if v.ndim < 2 or len(v) != len(names) or 0 in v.shape:
            raise ValueError(f"vectors has shape {tuple(v.shape)} for {len(names)} names: (names, ...) is taken")
        if len(set(names)) != len(names):
            raise ValueError(f"two vectors have one name: {', '.join(names)}")
        if not bool(torch.isfinite(v).all()):
            raise ValueError("vectors holds values that are not finite")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "vectors", v.detach().to("cpu", torch.float32).contiguous())

    @classmethod
    def mean_difference(cls, target, rest) -> LatentVector:
        """mean(target) - mean(rest), in float64, for one target or several.

        target: {name: data}, or data, which is then named "vector"; rest: data. data: (N, *shape) of floating point, or an
        iterable of such batches or of tuples that begin with one (a DataLoader). Raises as ``Gaussian.fit``.

        >>> import fastdiff as fd
        >>> images = fd.randn((200, 1, 4, 4), seeds=0)
        >>> bright = LatentVector.mean_difference(images[:100] + 1, images)
        >>> plan = fd.plan("euler", schedule="edm", prediction="denoised", steps=10)
        >>> gaussian = lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
        >>> more = fd.sample(gaussian, plan, (4, 1, 4, 4), seeds=0, steering=[bright.at(weight=[0.0, 0.5, 1.0, 2.0])])
        >>> more.mean((1, 2, 3)).argsort().tolist()
        [0, 1, 2, 3]
        """
        targets = target if isinstance(target, Mapping) else {"vector": target}
        if not targets:
            raise ValueError("no target was given: one or more are taken")
        rest = Gaussian.fit(rest, rank=0, name="rest")
        means = {name_of(name): Gaussian.fit(data, rank=0, name=f"target {name_of(name)!r}") for name, data in targets.items()}
        for name, mean in means.items():
            same_scale(f"target {name!r}", mean.about, "rest", rest.about)
        fitted = {"rest": dict(rest.about), **{f"target.{i}": dict(m.about) for i, m in enumerate(means.values())}}
        vectors = torch.stack([m.mean - rest.mean for m in means.values()])
        return cls(vectors, tuple(means), {"method": "mean difference", "fitted": fitted})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.vectors.shape[1:])

    @property
    def _range(self):
        """Of the data that it was fitted on, where that is known."""
        return (self.about or {}).get("fitted", {}).get("rest", {}).get("range")

    def at(self, weight=1.0, window=(0.0, float("inf")), target=None, *, steps=None) -> Latents:
        """The action for ``fd.sample(..., steering=[...])``.

        weight: w, a number or (B,), one a sample; or {name: weight} for several vectors at once. window, steps: see
        ``NoiseAlignment.at``. target: which vector, a name or B of them; not needed where there is one, or where the
        weights name them.
        """
        return Latents(self, weight, window, target, steps)

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as safetensors, with what it was fitted on and a checksum."""
        about = {"kind": "latent_vector", "names": list(self.names), "about": dict(self.about or {})}
        files.save(path, {"vectors": self.vectors}, about)

    @classmethod
    def load(cls, path: str | os.PathLike, *, shape: Iterable[int] | None = None,
             values: tuple[float, float] | None = None) -> LatentVector:
        """What ``save`` wrote. shape, values: see ``NoiseAlignment.load``. Raises ``ValueError``, ``OSError``."""
        tensors, about = files.load(path, "latent_vector")
        if set(tensors) != {"vectors"}:
            raise ValueError(f"{os.fspath(path)} holds {', '.join(sorted(tensors))}: vectors is taken")
        files.check_made_for(os.fspath(path), tensors["vectors"].shape[1:], shape)
        made = cls(tensors["vectors"], tuple(about["names"]), about["about"])
        if made._range:
            files.check_values(os.fspath(path), made._range, values)
        return made

    def __repr__(self) -> str:
        return f"LatentVector({', '.join(self.names)}, samples of shape {self.shape})"


@dataclass(frozen=True)
class Latents:
    """What ``LatentVector.at`` returns: an action. See there."""

    latent: LatentVector
    weight: object
    window: tuple[float, float] | None
    target: object
    steps: tuple[int, int] | None

    def begin(self, setting: Setting) -> Acting:
        batch, names = setting.shape[0], self.latent.names
        files.check_made_for("this vector", self.latent.shape, setting.shape[1:])
        if self.latent._range:
            check_clip("this vector", self.latent._range, setting.plan)
        rows = rows_in(setting.plan, self.window, self.steps)
        if isinstance(self.weight, Mapping):
            if self.target is not None or not self.weight:
                named = ", ".join(map(str, self.weight)) or "no vector"
                raise ValueError(f"weights for {named} and target {self.target!r}: weights by name, or one weight and a target, "
                                 "are taken")
            which = torch.stack([chosen(name_of(name), names, batch, "vector") for name in self.weight], 1)
            weight = torch.stack([per_sample(w, batch, f"the weight of {name!r}") for name, w in self.weight.items()], 1)
        else:
            which = chosen(self.target, names, batch, "vector")[:, None]
            weight = per_sample(self.weight, batch)[:, None]
        return _Added(setting, rows, self.latent.vectors, which, weight)


class _Added(Acting):
    def __init__(self, setting: Setting, rows: np.ndarray, vectors: torch.Tensor, which: torch.Tensor, weight: torch.Tensor):
        self.plan = setting.plan.with_bank(g=np.repeat(rows[:, None], which.shape[1], axis=1).astype(np.float64))
        self.vectors = vectors.to(setting.device)
        self.index = torch.zeros(setting.size, which.shape[1], dtype=torch.int64, device=setting.device)
        self._which, self._weight = which, weight
        self._now = torch.zeros(setting.size, which.shape[1], device=setting.device)
        self._written = None

    def select(self, index) -> None:
        self.index.copy_(self._which[index])
        self._now.copy_(self._weight[index])
        self._written = None

    def weights(self, run, out) -> None:
        if self._written != out.data_ptr():  # they are the same in every row, and outside of the window the row reads none
            out.copy_(self._now)
            self._written = out.data_ptr()
