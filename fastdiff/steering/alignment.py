"""Noise alignment: the difference of two Gaussian denoisers, of a class and of all data, added to the network's estimate.

    D(x, sigma) += w (D_class(x, sigma) - D_full(x, sigma))                     in a window of noise levels
    D_*(x, sigma) = mu_* + U_* diag(lambda_* / (lambda_* + sigma^2)) U_*^T (x - mu_*)            x = x0 + sigma n

Where noise hides everything but first and second moments, a network's denoiser is nearly D_full and a class-conditional one
nearly D_class, so this is classifier-free guidance without the conditional network. It needs no gradient, no second network
and no second call. Wang, Belkin and Wang, "General and Efficient Steering of Unconditional Diffusion", arXiv:2602.11395.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..action import Acting, Setting
from ..plan import LIMITS, Plan
from ..reference.project import MAX_TERMS
from . import files
from .data import same_scale
from .gaussian import GAIN, Gaussian
from .maps import KEPT, Kept, Mapped, affine, maps_kept
from .window import check_clip, chosen, fresh_name, name_of, per_sample, rows_in

__all__ = ["Alignment", "NoiseAlignment"]

BANK_COLUMNS = 5
"""Up to here the bank is faster on a CPU, by a launch and a pass. At 7 columns the two are level; at 15, for more than one sample,
the row mostly takes longer for its columns than a pass of their own does: `python -m benchmarks.alignment`."""


@dataclass(frozen=True, eq=False, repr=False)
class NoiseAlignment:
    """Gaussians of all data and of one or more targets: full, and targets by name."""

    full: Gaussian
    targets: Mapping[str, Gaussian]
    _tables: Kept = field(default_factory=lambda: Kept(8), init=False)
    _maps: Kept = field(default_factory=maps_kept, init=False)

    def __post_init__(self):
        if not self.targets:
            raise ValueError("no target was given: one or more are taken")
        wrong = [type(g).__name__ for g in (self.full, *self.targets.values()) if not isinstance(g, Gaussian)]
        if wrong:
            raise TypeError(f"{wrong[0]} was given: Gaussians are taken. NoiseAlignment.fit makes them of data")
        for name, target in self.targets.items():
            same_scale(f"target {name!r}", target.about, "the full data", self.full.about)

    @classmethod
    def fit(cls, target_images, full_data, *, sigma: float = 0.5, gain: float = GAIN, rank: int | None = None) -> NoiseAlignment:
        """From images of what is wanted, and of everything that the network was trained on.

        target_images: {name: data}, or data of one target, which is then named "target". A name is text or an int. full_data:
        data. data: (N, *shape) of floating point in the range that the network was trained on, or an iterable of such batches
        or of tuples that begin with one (a DataLoader); each is gone through once. Or a ``Gaussian`` that was fitted already.
        sigma: the lowest noise level that it is to be used at; gain, rank: see ``Gaussian.fit``.
        Raises ``ValueError`` or ``TypeError`` for NaN, fewer than two samples, shapes or ranges that differ.

        >>> import fastdiff as fd
        >>> everything = fd.randn((400, 1, 4, 4), seeds=0)
        >>> na = NoiseAlignment.fit({"bright": everything[:100] + 1}, everything)
        >>> plan = fd.plan("euler", schedule="edm", prediction="denoised", steps=10)
        >>> gaussian = lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
        >>> images = fd.sample(gaussian, plan, (8, 1, 4, 4), seeds=0, steering=[na.at(weight=1, window=(0.5, 80))])
        >>> bool(images.mean() > 0.7)
        True
        """
        targets = target_images if isinstance(target_images, Mapping) else {"target": target_images}
        if not targets:
            raise ValueError("no target was given: one or more are taken")
        names = [name_of(name) for name in targets]
        if len(set(names)) != len(names):
            raise ValueError(f"two targets have one name: {', '.join(names)}")
        options = {"sigma": sigma, "gain": gain, "rank": rank}

        def fitted(data, name):
            return data if isinstance(data, Gaussian) else Gaussian.fit(data, name=name, **options)

        full = fitted(full_data, "the full data")
        return cls(full, {name: fitted(data, f"target {name!r}") for name, data in zip(names, targets.values())})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.full.shape

    def at(self, weight=3.0, window=(5.3, float("inf")), target=None, *, steps=None, rank: int | None = None, gain: float = GAIN,
           how: str | None = None) -> Alignment:
        """The action for ``fd.sample(..., steering=[...])``.

        weight: w, a number or (B,), one a sample; window: (low, high), noise levels sigma_t / alpha_t, both in it, high may be
        infinite; or None, and steps: (first, last) of the sampler, with all their stages. target: a name, or B of them; not
        needed where there is one.
        rank: so many directions of each Gaussian in every row; otherwise those whose gain is above ``gain`` at the lowest
        level of the window, and at higher levels only as many as keep the map as exact as it is there.
        how: "bank": projections are weights of vectors in the row's bank (at most 16 columns); "lift": the sum is made in one
        more pass and is one more input of the row; "map": so is A x + b, with one matrix for each noise level, made at the first
        run and kept: the fastest for many samples of few values (4,095 at most) whose directions are more than half as many,
        see ``maps``; None: the faster one, see ``BANK_COLUMNS`` and ``faster``.

        The defaults are what the paper's author published for CIFAR-10 (18 steps of Heun from sigma 80, w = 3 in the steps 0 to
        7), but for the second stage of step 7, at sigma 3.3: ``window=None, steps=(0, 7)`` has that too.
        """
        return Alignment(self, weight, window, target, steps, rank, gain, how)

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as safetensors, with what it was fitted on and a checksum."""
        gaussians = {"full": self.full, **{f"target.{i}": g for i, g in enumerate(self.targets.values())}}
        tensors = {f"{where}.{name}": t for where, g in gaussians.items() for name, t in g.tensors().items()}
        about = {"kind": "noise_alignment", "targets": list(self.targets),
                 "fitted": {where: dict(g.about) for where, g in gaussians.items()}}
        files.save(path, tensors, about)

    @classmethod
    def load(cls, path: str | os.PathLike, *, shape: Iterable[int] | None = None,
             values: tuple[float, float] | None = None) -> NoiseAlignment:
        """What ``save`` wrote: it steers with the same bits.

        shape: of one sample of the network that it is for; values: (low, high), the range of its images. Given, they must be
        those that it was fitted on, the range within 5 % of its width. Raises ``ValueError``, ``OSError``.
        """
        tensors, about = files.load(path, "noise_alignment")
        parts: dict[str, dict] = {}
        for name, t in tensors.items():
            where, _, last = name.rpartition(".")
            parts.setdefault(where, {})[last] = t
        keys = ["full", *(f"target.{i}" for i in range(len(about["targets"])))]
        if set(keys) != set(parts) or set(keys) != set(about["fitted"]):
            raise ValueError(f"{os.fspath(path)} holds {', '.join(sorted(parts))}: {', '.join(keys)} are taken")
        full, *targets = (Gaussian.from_tensors(parts[key], about["fitted"][key]) for key in keys)
        files.check_made_for(os.fspath(path), full.shape, shape)
        files.check_values(os.fspath(path), full.about["range"], values)
        return cls(full, dict(zip(about["targets"], targets)))

    def __repr__(self) -> str:
        return f"NoiseAlignment({', '.join(self.targets)}; full: {self.full!r})"


def faster(columns: int, free: int, values: int, device: torch.device, maps: int = 1) -> str:
    """The way of a run with so many directions (of the targets in use), free columns of the bank and values of a sample; maps: how
    many matrices the run takes at most, one a row and target (rows of one level share theirs). It does not depend on the size of
    the batch, and so neither do the bits. On a GPU a matrix is made in no time; on a CPU in that of a thousand samples, who asks for it."""
    if columns <= min(free, BANK_COLUMNS):
        return "bank"
    fit = values < MAX_TERMS and 4 * maps * values * (values + 1) <= KEPT
    return "map" if device.type == "cuda" and fit and 2 * columns > values + 1 else "lift"


@dataclass(frozen=True)
class Alignment:
    """What ``NoiseAlignment.at`` returns: an action. See there."""

    alignment: NoiseAlignment
    weight: object
    window: tuple[float, float] | None
    target: object
    steps: tuple[int, int] | None
    rank: int | None
    gain: float
    how: str | None

    def begin(self, setting: Setting) -> Acting:
        if self.how not in (None, "bank", "lift", "map"):
            raise ValueError(f"how is {self.how!r}: 'bank', 'lift', 'map' or None is taken")
        full, plan = self.alignment.full, setting.plan
        files.check_made_for("this alignment", full.shape, setting.shape[1:])
        check_clip("this alignment", full.about["range"], plan)
        if self.window is None and self.steps is None:
            raise ValueError("neither window nor steps was given: one of them, or both, is taken")
        rows = rows_in(plan, self.window, self.steps)
        weight = per_sample(self.weight, setting.shape[0])
        which = chosen(self.target, self.alignment.targets, setting.shape[0])
        used, which = torch.unique(which, return_inverse=True)
        names = list(self.alignment.targets)
        targets = {names[i]: self.alignment.targets[names[i]] for i in used.tolist() or [0]}
        if self.how == "map":
            return self._mapped(setting, rows, targets, weight, which)
        rank, gain = _checked(self.rank, self.gain)
        device = torch.empty(0, device=setting.device).device  # with its number
        table = self.alignment._tables.get(
            (*targets.values(), rows.tobytes(), plan.sigmas.tobytes(), plan.input_scales.tobytes(), rank, gain, device),
            lambda: _table(full, targets, plan, rows, rank, gain).on(device))
        columns, free = table.index.shape[1], LIMITS["bank"] - plan.bank
        how = self.how or faster(columns, free, full.mean.numel(), setting.device, int(rows.sum()) * len(targets))
        if how == "map":
            return self._mapped(setting, rows, targets, weight, which)
        if how == "bank" and columns > free:
            raise ValueError(f"the bank has {free} columns free and the alignment takes {columns}: how='lift', or a lower rank, "
                             "is taken")
        if how == "lift" and columns > MAX_TERMS:
            raise ValueError(f"the alignment takes {columns} directions, {MAX_TERMS} are the most: a lower rank, a higher gain "
                             "or a window that ends higher is taken")
        return {"bank": _Banked, "lift": _Lifted}[how](setting, rows, table, weight, which)

    def _mapped(self, setting, rows, targets, weight, which) -> Mapped:
        full, plan, device = self.alignment.full, setting.plan, torch.empty(0, device=setting.device).device
        values = full.mean.numel()
        if values >= MAX_TERMS:
            raise ValueError(f"a sample has {values} values, how='map' takes {MAX_TERMS - 1} at most: how='lift' is taken")
        levels = plan.sigmas[rows]
        gaussians = {"the full data": full, **{f"target {name!r}": target for name, target in targets.items()}}
        ranks = np.stack([_ranks(name, g, levels, self.rank, self.gain) for name, g in gaussians.items()], 1)
        maps: list = [None] * len(plan)
        for row, level, own in zip(np.flatnonzero(rows).tolist(), levels.tolist(), ranks.tolist()):
            key = (*targets.values(), level, *own, device)
            maps[row] = self.alignment._maps.get(key, lambda: affine(full, list(targets.values()), level, own, device))
        return Mapped(setting, rows, maps, weight, which, len(targets))


@dataclass
class _Table:
    """What ``project_`` takes: vectors (V, *shape), gain and offset (N, V) float32; and for each target in use which vectors
    it has, index (T, M), and in which of the M columns, used (T, M)."""

    vectors: torch.Tensor
    gain: torch.Tensor
    offset: torch.Tensor
    index: torch.Tensor
    used: torch.Tensor

    def on(self, device) -> _Table:
        """With what the ops read on a device."""
        return replace(self, vectors=self.vectors.to(device), gain=self.gain.to(device), offset=self.offset.to(device))


def _checked(rank, gain) -> tuple[int | None, float]:
    try:
        number = None if rank is None else operator.index(rank)
    except TypeError:
        number = -1
    if isinstance(rank, bool) or number is not None and number < 0:
        raise ValueError(f"rank is {rank!r}: an int of 0 or more is taken")
    if rank is None and not 0 <= gain < 1:
        raise ValueError(f"gain is {gain!r}: a number from 0 to below 1 is taken")
    return number, float(gain)


def _ranks(name, gaussian: Gaussian, levels: np.ndarray, rank: int | None, gain: float) -> np.ndarray:
    """How many directions each level takes: at the lowest those whose gain is above ``gain``, at the others the fewest that
    lose no more than is lost there (``Gaussian.tails``); or ``rank`` everywhere."""
    all_of_it = gaussian.rest <= 1e-9 * gaussian.variance
    rank, gain = _checked(rank, gain)
    if rank is not None:
        if rank > gaussian.rank and not all_of_it:
            raise ValueError(f"rank is {rank}: {name} was fitted with {gaussian.rank} directions")
        return np.full(len(levels), min(int(rank), gaussian.rank))
    low = float(levels.min())
    at_low = gaussian.gains(low)
    enough = gaussian.about.get("enough")
    fitted = enough is not None and low >= enough[0] * (1 - 1e-9) and gain >= enough[1]
    short = not len(at_low) or at_low[-1] > gain
    if short and not (all_of_it or fitted) and gaussian.about["asked"] is None:
        raise ValueError(f"the window goes down to sigma {low:.4g}: {name} was fitted with {gaussian.rank} directions, which is "
                         f"enough down to sigma {_lowest(gaussian, gain):.4g}; fit it with sigma={low:.4g}, or say rank=")
    most = int((at_low > gain).sum())
    allowed = float(gaussian.tails(low)[most])
    tails = {level: gaussian.tails(level) for level in set(levels.tolist())}
    fewest = {level: int((tail > allowed).sum()) for level, tail in tails.items()}
    return np.array([min(most, fewest[level]) for level in levels.tolist()])


def _lowest(gaussian, gain) -> float:
    """The level at which the last direction's gain is ``gain``."""
    return float((gaussian.eigenvalues[-1] * (1 - gain) / gain).sqrt()) if gaussian.rank and gain else float("inf")


def _table(full: Gaussian, targets: Mapping[str, Gaussian], plan: Plan, rows: np.ndarray, rank, gain) -> _Table:
    """D_class - D_full as gains and offsets of vectors: [mu_class - mu_full, U_class] of each target, then U_full.

    U g U^T (x - mu) = U (g U^T x - g U^T mu), and x is the model's input over its scale. In float64, rounded once at the end.
    """
    levels, scales = plan.sigmas[rows], plan.input_scales[rows]
    parts: list[tuple] = []  # vectors, gains (levels, vectors), offsets (levels, vectors)

    def filtered(name, gaussian, sign):
        ranks = _ranks(name, gaussian, levels, rank, gain)
        most = int(ranks.max())
        basis, values = gaussian.basis[:most], gaussian.eigenvalues[:most].numpy()
        g = sign * values / (values + levels[:, None] ** 2) * (np.arange(most) < ranks[:, None])
        along = (basis.flatten(1).to(torch.float64) @ gaussian.mean.reshape(-1)).numpy()
        return basis, g / scales[:, None], -g * along

    def put(*more) -> list[int]:
        first = sum(len(part[0]) for part in parts)
        parts.extend(more)
        return list(range(first, sum(len(part[0]) for part in parts)))

    members = []
    for name, target in targets.items():
        moved = (target.mean - full.mean).to(torch.float32)[None], np.zeros((len(levels), 1)), np.ones((len(levels), 1))
        members.append(put(moved, filtered(f"target {name!r}", target, 1.0)))
    shared = put(filtered("the full data", full, -1.0))
    columns = max(map(len, members)) + len(shared)
    index, used = np.zeros((len(members), columns), np.int64), np.zeros((len(members), columns), np.float32)
    for t, member in enumerate(members):
        own = member + shared
        index[t, : len(own)], used[t, : len(own)] = own, 1.0

    vectors, gains, offsets = zip(*parts)

    def by_row(values):
        table = np.zeros((len(plan), sum(map(len, vectors))), np.float32)
        table[rows] = np.concatenate(values, axis=1)
        return torch.from_numpy(table)

    return _Table(torch.cat(vectors), by_row(gains), by_row(offsets), torch.from_numpy(index), torch.from_numpy(used))


class _Projected(Acting):
    """The gains times projections of one micro-batch, times its weights: (size, M)."""

    def __init__(self, setting: Setting, rows: np.ndarray, table: _Table, weight: torch.Tensor, which: torch.Tensor):
        device, size, columns = setting.device, setting.size, table.index.shape[1]
        self._rows, self._table, self._weight, self._which = rows.tolist(), table, weight, which
        self._vectors, self._gain, self._offset = table.vectors, table.gain, table.offset
        self._index = table.index[:1].to(device).repeat(size, 1)
        self._own = torch.zeros(size, columns, dtype=torch.float32, device=device)
        # Where all samples have one target, term m is vector m, and no index is read.
        self._given = self._index if len(table.index) > 1 else None

    def select(self, index: torch.Tensor) -> None:
        which = self._which[index]
        self._own.copy_(self._table.used[which] * self._weight[index, None])
        if self._given is not None:
            self._index.copy_(self._table.index[which])

    def _project(self, run, out) -> None:
        torch.ops.fastdiff.project_(out, run.model_input, self._vectors, self._given, self._gain, self._offset, self._own,
                                    None, run.row)


class _Banked(_Projected):
    """The sum is made inside the row, from the bank."""

    def __init__(self, setting, rows, table, weight, which):
        super().__init__(setting, rows, table, weight, which)
        self.vectors, self.index = self._vectors, self._index
        self.plan = setting.plan.with_bank(g=np.repeat(rows[:, None], self.index.shape[1], axis=1).astype(np.float64))

    def weights(self, run, out) -> None:
        if self._rows[run.row]:
            self._project(run, out)


class _Lifted(_Projected):
    """The sum is made in a pass of its own, and is one more input of the row."""

    def __init__(self, setting, rows, table, weight, which):
        super().__init__(setting, rows, table, weight, which)
        self.plan = setting.plan.with_input(fresh_name("steer", setting.plan), d=rows.astype(np.float64))
        self._along = torch.empty_like(self._own)
        self._sum = torch.empty(setting.size, *setting.shape[1:], dtype=torch.float32, device=setting.device)

    def outputs(self, run, evaluate) -> tuple:
        outputs = evaluate()
        if self._rows[run.row]:
            self._project(run, self._along)
            torch.ops.fastdiff.lift_(self._sum, self._vectors, self._given, self._along)
        return (*outputs, self._sum)
